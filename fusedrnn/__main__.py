"""`python -m fusedrnn` prints what is installed and which kernels run."""

from ._library import show_config

if __name__ == "__main__":
    show_config()

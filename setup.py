"""Builds fusedrnn/_C.so and _cuda.so and tags the wheel. The metadata is in pyproject.toml."""

from __future__ import annotations

import os
import sys

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"error: the build needs setuptools >= 77, got {setuptools.__version__} in "
        f"{sys.executable}: install it there with `pip install 'setuptools>=77'`"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.errors import BaseError

# A PEP 517 build does not put this folder on Python's path.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import setup_build

CUDA_LIBRARY = "fusedrnn._cuda"


class NinjaBuild(build_ext):
    """build_ext that lets setup_build compile and link."""

    def get_ext_filename(self, fullname: str) -> str:
        # The library serves every Python, so its name has no Python version.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        try:
            with_cuda, why = setup_build.cuda_choice()
        except setup_build.BuildError as error:
            raise BaseError(str(error)) from None
        print(f"fusedrnn: {'with' if with_cuda else 'without'} the CUDA library: {why}")
        if not with_cuda:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_LIBRARY]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build = {CUDA_LIBRARY: setup_build.build_cuda_library}.get(
            ext.name, setup_build.build_library
        )
        try:
            library = build()
        except setup_build.BuildError as error:
            raise BaseError(str(error)) from None
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(library), target)


class EarlyCheck(dist_info):
    """Checks for torch when pip asks for the metadata.

    pip does so before it downloads the requirements, which takes minutes for torch. The wheel is
    built before they are installed, so without torch the build would fail after the download.
    """

    def run(self) -> None:
        try:
            setup_build.torch_dir()
        except setup_build.BuildError as error:
            raise BaseError(str(error)) from None
        super().run()


class AnyPythonWheel(bdist_wheel):
    """A wheel for every Python 3 on one platform, since the library uses no symbol of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fusedrnn._C", sources=[]), Extension(CUDA_LIBRARY, sources=[])],
    cmdclass={"build_ext": NinjaBuild, "dist_info": EarlyCheck, "bdist_wheel": AnyPythonWheel},
)

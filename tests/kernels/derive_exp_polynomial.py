"""Derives the constants of csrc/cpu/vecmath.h: ln 2 in two parts, and the polynomial of exp.

exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2. The coefficients of q are the least-squares fit of
the relative error of the right-hand side on Chebyshev nodes (60 digits), which is close to the
polynomial of least maximal error. They are rounded to the type one at a time from the lowest, and
after each rounding the remaining coefficients are fitted again, so that they make up for its error.

Needs mpmath:  python tests/kernels/derive_exp_polynomial.py
"""

import mpmath as mp

mp.mp.dps = 60
# Just over ln(2) / 2: the rounding of x log2(e) may pick the neighbouring integer near a tie.
HALF_WIDTH = mp.log(2) / 2 * mp.mpf("1.0001")
NODES = [HALF_WIDTH * mp.cos(mp.pi * (2 * k + 1) / 400) for k in range(200)]


def rounded(value: mp.mpf, bits: int) -> mp.mpf:
    """value rounded to nearest with the given number of significant bits."""
    with mp.workprec(bits):
        return +value


def fit(fixed: list[mp.mpf], count: int) -> list[mp.mpf]:
    """The coefficients that, after the fixed ones, make 1 + r + r^2 q(r) closest to exp(r)."""
    rows, wanted = [], []
    for r in NODES:
        weight = r**2 / mp.exp(r)
        rest = (mp.expm1(r) - r) / r**2 - mp.polyval(fixed[::-1] or [0], r)
        rows.append([weight * r**k for k in range(len(fixed), count)])
        wanted.append(weight * rest)
    solution, _ = mp.qr_solve(mp.matrix(rows), mp.matrix(wanted))
    return list(solution)


def worst_error(q: list[mp.mpf]) -> mp.mpf:
    """The largest relative error of 1 + r + r^2 q(r)."""
    points = [HALF_WIDTH * (mp.mpf(k) / 1000 - 1) for k in range(2001)]
    return max(abs((1 + r + r**2 * mp.polyval(q[::-1], r)) / mp.exp(r) - 1) for r in points)


def derive(name: str, bits: int, degree: int, exponent_bits: int) -> None:
    """Prints the constants of a type of `bits` significant bits."""
    ln2_hi = rounded(mp.log(2), bits - exponent_bits)
    ln2_lo = rounded(mp.log(2) - ln2_hi, bits)
    count = degree - 1
    q: list[mp.mpf] = []
    while len(q) < count:
        q.append(rounded(fit(q, count)[0], bits))
    print(f"{name}: exp of degree {degree}, relative error {mp.nstr(worst_error(q), 3)}")
    log2e = rounded(1 / mp.log(2), bits)
    for label, value in [("log2e", log2e), ("ln2_hi", ln2_hi), ("ln2_lo", ln2_lo)]:
        print(f"  {label} = {float(value).hex()}")
    print("  q = " + ", ".join(float(c).hex() for c in q))


if __name__ == "__main__":
    # n ln2_hi must be exact for every n in use, |n| <= 151 and |n| <= 1076, so n has 8 and 11 bits.
    # Degree 5 would leave an error of 1.2e-7 in float, two units in the last place.
    derive("float", bits=24, degree=6, exponent_bits=8)
    derive("double", bits=53, degree=11, exponent_bits=11)

"""The part of the package that is compiled; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "fmextract._kernels",
            ["fmextract/_kernels.c"],
            # Sums stay in the order that is written: no fused multiply-add, which not every processor has.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            py_limited_api=True,
            optional=True,  # without a compiler the same is done by torch and numpy, in more time
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

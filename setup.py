"""The part of the package that is compiled; everything else is in pyproject.toml."""

import sysconfig

from setuptools import Extension, setup

# The library holds nothing of Python. The name says that one fits all versions, where setuptools knows how to say so.
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "fmextract.common._kernels",
            ["fmextract/common/_kernels.c"],
            depends=["setup.py"],
            # Sums stay in the order that is written: no fused multiply-add, which not every processor has.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-fast-math"],
            py_limited_api=stable,
            optional=True,  # without a compiler the same is done by torch and numpy, in more time
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {},
)

"""Where the kernels can be, they are: the tests of them that are left out elsewhere must not be left out here."""

import shutil

from vaelab.native import build, library, reason


def test_a_processor_and_a_compiler_make_kernels():
    try:
        build.abilities()
    except build._Unavailable as why:
        assert library() is None and str(why) in reason()
        return
    if any(map(shutil.which, build.COMPILERS)):
        assert library() is not None, reason()

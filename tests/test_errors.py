import pytest

import apd_lens as apd
from apd_lens import _errors

ERRORS = [value for value in vars(_errors).values() if isinstance(value, type) and issubclass(value, apd.ApdError)]


@pytest.mark.parametrize("error", [error for error in ERRORS if error is not apd.ApdError])
def test_every_error_is_ours_and_the_built_in_one_that_a_caller_expects(error: type[apd.ApdError]):
    built_in = [base for base in error.__mro__ if base.__module__ == "builtins"]
    assert built_in[0] not in (Exception, BaseException, object)
    assert error.__doc__
    assert getattr(apd.errors, error.__name__) is error

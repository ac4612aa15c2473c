//! End-to-end tests and the house checking itself; the tests lie in `tests/tests`.

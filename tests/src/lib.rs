//! What the tests of several crates share; the end-to-end tests lie in `tests/tests`.
#![forbid(unsafe_code)]

pub mod nibble;
pub mod real_model;
pub mod tiny_model;

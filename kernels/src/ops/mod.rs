//! One line per operation; each folder holds its definition, reference, implementations and tests.

pub mod paged_attention;

//! The devices operations run on.

pub mod cpu;
pub mod cuda;

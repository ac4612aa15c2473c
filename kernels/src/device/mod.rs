//! The devices operations run on, and decorators over them.

mod capturing;
pub mod cpu;

pub use capturing::{Capturing, LinearInput};

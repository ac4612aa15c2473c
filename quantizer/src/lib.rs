//! RTN and GPTQ quantization to INT4.
#![forbid(unsafe_code)]

//! llama.cpp's files: adapters and merged models written to GGUF.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `export` | the command `export-gguf` |
//! | `adapter` | an adapter as llama.cpp sees it |

mod adapter;
mod export;

pub use export::{ExportGgufArgs, run};

//! llama.cpp's files: models read from GGUF with their tokenizers, adapters and merged models written to it.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `tokenizer` | a GGUF file's tokenizer and chat template as a Hugging Face folder's files |
//! | `vocabulary` | the other way round |
//! | `pre_tokenizer` | llama.cpp's names for how text is cut, and the rules |
//! | `export` | the command `export-gguf` |
//! | `adapter` | an adapter as llama.cpp sees it |

mod adapter;
mod export;
mod pre_tokenizer;
mod tokenizer;
mod vocabulary;

pub use export::{ExportGgufArgs, run};
pub use tokenizer::model_files;

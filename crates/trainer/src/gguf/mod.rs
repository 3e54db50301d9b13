//! llama.cpp's files: models read from GGUF with their tokenizers, adapters and merged models written to it.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `tokenizer` | a GGUF file's tokenizer and chat template as a Hugging Face folder's files |
//! | `pre_tokenizer` | llama.cpp's names for how text is cut, and the rules |

mod pre_tokenizer;
mod tokenizer;

pub use tokenizer::model_files;

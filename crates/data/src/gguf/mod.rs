//! A GGUF file's tokenizer as the files of a Hugging Face folder, and the other way round.

mod pre_tokenizer;
mod tokenizer;
mod vocabulary;

pub use tokenizer::model_files;
pub use vocabulary::tokenizer_metadata;

//! What can be wrong with the data, the tokenizer or the chat template.

use std::path::PathBuf;

/// What is wrong with one line of a data file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// The line is not text.
    #[error("not UTF-8 text (byte {column} of the line); save the file as UTF-8")]
    NotUtf8 {
        /// The first byte that is wrong, from 1.
        column: usize,
    },
    /// The line is not JSON.
    #[error(
        "not valid JSON: {message} at column {column}; every line must be one complete JSON object"
    )]
    Json {
        /// What the parser says.
        message: String,
        /// Where in the line, from 1.
        column: usize,
    },
    /// A line that is longer than any row can be.
    #[error("longer than {} MiB; a row is one line", limit >> 20)]
    TooLong {
        /// Bytes of the longest line that is read.
        limit: usize,
    },
    /// The line is JSON, but no object.
    #[error("expected an object {{\"context\": …, \"target\": …}}, got {got}")]
    NotAnObject {
        /// The JSON type that is there.
        got: &'static str,
    },
    /// A key is not there.
    #[error("the key \"{key}\" is missing; the line has {}", keys(present))]
    MissingKey {
        /// The key.
        key: &'static str,
        /// The keys that the line has.
        present: Vec<String>,
    },
    /// A value has another type than it must.
    #[error("\"{key}\" must be {wanted}, got {got}")]
    WrongType {
        /// The key.
        key: String,
        /// What it must be.
        wanted: &'static str,
        /// The JSON type that is there.
        got: &'static str,
    },
    /// There is nothing to learn.
    #[error("\"{key}\" is empty: there is nothing to learn; remove the line or give the answer")]
    Empty {
        /// The key.
        key: &'static str,
    },
    /// No format has such keys.
    #[error(
        "the row has {}, which is no format known here; expected \"context\" and \"target\", \"messages\", \
         \"instruction\" and \"output\", \"prompt\" and \"completion\", or \"text\"",
        keys(present)
    )]
    UnknownFormat {
        /// The keys that the row has.
        present: Vec<String>,
    },
    /// A key that would change what is learned, and is not read.
    #[error("\"{key}\" is not supported in Alpaca rows; write the row as \"messages\"")]
    NotSupported {
        /// The key.
        key: &'static str,
    },
    /// A message of a conversation is none.
    #[error("{place} {problem}")]
    WrongMessage {
        /// Which.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A conversation without anything to learn.
    #[error(
        "no assistant turn to learn: the messages are of {}; a message to learn has the role \"assistant\"",
        if roles.is_empty() { "no messages".into() } else { roles.join(", ") }
    )]
    NoAssistant {
        /// The roles that are there.
        roles: Vec<String>,
    },
    /// Every turn of the assistant is marked as given.
    #[error(
        "no turn is learned: each of the assistant's is marked as given (\"weight\": 0 or the like)"
    )]
    NothingLearned,
    /// A system prompt in a column and one among the messages.
    #[error("a \"system\" column, and a first message of the role \"system\": which one is meant?")]
    TwoSystemPrompts,
    /// A column that changes what is learned, and is not honoured.
    #[error("the column \"{key}\" would change what is learned and is not honoured here; {remedy}")]
    NotHonoured {
        /// The column.
        key: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// An assistant's turn without content.
    #[error("messages[{turn}] is a turn of the assistant that is empty: there is nothing to learn")]
    EmptyTurn {
        /// Which message.
        turn: usize,
    },
    /// A table's row is no row of the table.
    #[error("{0}")]
    Table(String),
}

fn keys(present: &[String]) -> String {
    match present {
        [] => "no keys".into(),
        keys => keys
            .iter()
            .map(|key| format!("{key:?}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// Why there are no rows to train on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A GGUF file that is damaged or has no tokenizer that can be used.
    #[error(transparent)]
    Gguf(#[from] llama_burn::gguf::GgufError),
    /// A data file cannot be read.
    #[error("cannot read the data file {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A line is no row.
    #[error("{path}:{line}: {problem}\n  the line begins: {beginning}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: LineError,
        /// How the line begins.
        beginning: String,
    },
    /// A row of a binary file is no row.
    #[error("{path}, row {row}: {problem}", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The row, from 1.
        row: usize,
        /// What is wrong.
        problem: LineError,
    },
    /// A file that is not what its name says.
    #[error("{path} is not a valid {container} file: {message}", path = path.display())]
    Container {
        /// The file.
        path: PathBuf,
        /// What it should be.
        container: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A data file has no rows.
    #[error("{path} holds no rows; expected one JSON object {{\"context\", \"target\"}} per line", path = path.display())]
    NoRows {
        /// The file.
        path: PathBuf,
    },
    /// The template cannot be what the format needs.
    #[error(
        "{path} holds {format}, which prompt_template = \"{template}\" has no place for; {remedy}",
        path = path.display()
    )]
    TemplateForFormat {
        /// The data file.
        path: PathBuf,
        /// What it holds.
        format: &'static str,
        /// As configured.
        template: String,
        /// What would do.
        remedy: &'static str,
    },
    /// A conversation that the chat template does not render, or not turn by turn.
    #[error("{path}:{line}: {message}", path = path.display())]
    Conversation {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Rows without an answer that could be compared.
    #[error("{path} holds plain texts, which ask nothing; evaluation needs rows with an answer", path = path.display())]
    NoQuestion {
        /// The data file.
        path: PathBuf,
    },
    /// A text of which no token is predicted by another.
    #[error("{path}:{line}: the text has {tokens} token, so that there is nothing to predict", path = path.display())]
    TooShort {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// Its tokens.
        tokens: usize,
    },
    /// The split leaves one side without rows.
    #[error(
        "val_set_size = {val_set_size} takes {validation} of {rows} rows and leaves none to train on; \
         use a smaller val_set_size, or name a val_dataset_path"
    )]
    Split {
        /// As configured.
        val_set_size: f64,
        /// The rows it asks for.
        validation: usize,
        /// The rows there are.
        rows: usize,
    },
    /// A file of the model's folder that tokenization needs is missing or wrong.
    #[error("cannot use {path}: {message}", path = path.display())]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// The folder does not tell which token ends a text.
    #[error(
        "{folder} names no end token; give \"eos_token\" in tokenizer_config.json or \"eos_token_id\" \
         in generation_config.json or config.json", folder = folder.display()
    )]
    NoEndToken {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A chat template was asked for and there is none.
    #[error(
        "prompt_template = \"chat\", but {folder} has no chat template (\"chat_template\" in \
         tokenizer_config.json, or chat_template.jinja); use \"raw\", \"inst\" or \"custom:…{{context}}…\"",
        folder = folder.display()
    )]
    NoChatTemplate {
        /// The model's folder.
        folder: PathBuf,
    },
    /// The chat template cannot be rendered.
    #[error("the chat template of {path} fails: {message}", path = path.display())]
    ChatTemplate {
        /// The file that it is in.
        path: PathBuf,
        /// What the template engine, or the template itself, says.
        message: String,
    },
    /// The tokenizer refuses a row.
    #[error("{path}:{line}: the tokenizer fails on this row: {message}", path = path.display())]
    Tokenize {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// What the tokenizer says.
        message: String,
    },
    /// A token has no row in the model's embedding.
    #[error(
        "{path}:{line}: token {token:?} has id {id}, but the model's vocabulary has {vocab_size} tokens \
         (ids below {vocab_size}); the tokenizer does not belong to this model", path = path.display()
    )]
    TokenOutsideVocabulary {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// The model's vocabulary.
        vocab_size: usize,
    },
    /// The prompt has no token, so that nothing predicts the target's first one.
    #[error(
        "{path}:{line}: the prompt has no tokens (the context is empty and the tokenizer adds none), so \
         nothing predicts the target's first token; give the row a context, or use a prompt_template with text",
        path = path.display()
    )]
    EmptyPrompt {
        /// The data file.
        path: PathBuf,
        /// The row's line, from 1.
        line: usize,
    },
    /// Not one row is short enough.
    #[error(
        "all {rows} rows of {path} are longer than max_seq_len = {max_seq_len} (the shortest has \
         {shortest} tokens); raise max_seq_len to at least that", path = path.display()
    )]
    AllTooLong {
        /// The data file.
        path: PathBuf,
        /// How many rows there are.
        rows: usize,
        /// The tokens of the shortest.
        shortest: usize,
        /// As configured.
        max_seq_len: usize,
    },
}

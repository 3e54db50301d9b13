//! From a row to its token ids: prompt, target and end token; or a conversation; or a text.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use tokenizers::{AddedToken, Encoding, Tokenizer};

use super::chat;
use super::ends;
use super::error::{DataError, LineError};
use super::format::{Example, Format};
use super::guarded::Guarded;
use super::llama_tokenizer;
use super::model_files::ModelFiles;
use super::rows::Row;
use super::template::{ChatTemplate, Prompt};
use super::unwritten;
use crate::PromptTemplate;
use crate::contained::decoded;

/// The tokens of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedRow {
    /// The line in the data file, from 1.
    pub line: usize,
    /// All its tokens.
    pub ids: Vec<u32>,
    /// The tokens in the loss: ranges of positions, in order, at least one, none empty, none from 0 on, because no
    /// token predicts the first token of a row.
    pub learned: Vec<Range<usize>>,
}

impl TokenizedRow {
    /// A row of a prompt and a completion, with the loss on the completion.
    pub fn answer(line: usize, ids: Vec<u32>, prompt_tokens: usize) -> Self {
        Self {
            line,
            learned: std::iter::once(prompt_tokens..ids.len()).collect(),
            ids,
        }
    }

    /// The tokens in the loss, with their positions.
    pub fn supervised(&self) -> impl Iterator<Item = (usize, u32)> + Clone {
        let positions = self.learned.iter().cloned().flatten();
        positions.map(|position| (position, self.ids[position]))
    }

    /// The number of tokens in the loss.
    pub fn supervised_tokens(&self) -> usize {
        self.learned.iter().map(Range::len).sum()
    }

    /// The number of tokens before the first one in the loss; at least 1.
    pub fn prompt_tokens(&self) -> usize {
        self.learned
            .first()
            .map_or(self.ids.len(), |range| range.start)
    }
}

/// A prompt with its right answer, for evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The line in the data file, from 1.
    pub line: usize,
    /// The tokens of the prompt.
    pub prompt: Vec<u32>,
    /// The right answer.
    pub target: String,
}

/// A model's tokenizer with a prompt template and the end token.
///
/// Prompt and target are tokenized separately, so their boundary is a token boundary for any tokenizer. The prompt begins
/// with the tokens that the tokenizer's post-processor puts before a text (Llama: the BOS token), as in transformers; a
/// chat template writes its special tokens itself.
#[derive(Debug)]
pub struct RowTokenizer {
    tokenizer: Guarded,
    prompt: Prompt,
    /// For conversations, which only the chat template can render.
    chat: Option<ChatTemplate>,
    special: HashSet<u32>,
    before: Vec<u32>,
    end: u32,
}

impl RowTokenizer {
    /// From the files of a model's folder.
    ///
    /// # Errors
    ///
    /// A file that is not valid; no end token; no chat template if one is needed.
    pub fn new(files: &ModelFiles, template: &PromptTemplate) -> Result<Self, DataError> {
        const NAME: &str = "tokenizer.json";
        let rebuilt = llama_tokenizer::rebuilt(files)?;
        let json = rebuilt.as_deref().unwrap_or(&files.tokenizer);
        let mut guarded = Guarded::read(json)
            .map_err(|error| files.error(NAME, format!("not a valid tokenizer: {error}")))?;
        // Some tokenizer.json truncate and pad. Rows are never truncated, and packed batches have no padding.
        let tokenizer = &mut guarded.tokenizer;
        tokenizer
            .with_truncation(None)
            .map_err(|error| files.error(NAME, error.to_string()))?;
        tokenizer.with_padding(None);
        add_tokens(tokenizer, files)?;
        let prompt = Prompt::new(template, files)?;
        let before = if prompt.has_its_own_special_tokens() {
            Vec::new()
        } else {
            tokens_before(&guarded).map_err(|error| files.error(NAME, error))?
        };
        let tokenizer = &guarded.tokenizer;
        let end = files.end_token(|token| tokenizer.token_to_id(token))?;
        let added = tokenizer.get_added_tokens_decoder().into_iter();
        let special = added.filter(|(_, token)| token.special).map(|(id, _)| id);
        Ok(Self {
            special: special.collect(),
            tokenizer: guarded,
            prompt,
            chat: None,
            before,
            end,
        })
    }

    /// Prepares for the rows of the file `path`, which have this format.
    ///
    /// # Errors
    ///
    /// Conversations without a chat template; a prompt template that does not fit the format.
    pub fn prepare(
        &mut self,
        files: &ModelFiles,
        template: &PromptTemplate,
        format: Format,
        path: &Path,
    ) -> Result<(), DataError> {
        let unfit = |format, remedy| DataError::TemplateForFormat {
            path: path.into(),
            format,
            template: template.to_string(),
            remedy,
        };
        match (effective_template(template, format), format) {
            (None, Format::Text) => Err(unfit("plain texts", "leave it out, or write \"raw\"")),
            (None, _) => Err(unfit(
                "conversations",
                "leave it out, or write \"chat\": the model's chat template renders them",
            )),
            // A prompt may be a conversation.
            (_, Format::PromptCompletion) if !files.has_chat_template() => Ok(()),
            (_, Format::Messages | Format::PromptCompletion) => {
                self.chat = Some(ChatTemplate::new(files)?);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The tokenizer itself.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer.tokenizer
    }

    /// The id of the end token.
    pub fn end_token(&self) -> u32 {
        self.end
    }

    /// Whether a token is special.
    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Whether the prompt is the context unchanged.
    pub fn asks_contexts(&self) -> bool {
        matches!(self.prompt, Prompt::Raw) && self.chat.is_none()
    }

    /// Whether rows are rendered by the chat template as whole conversations.
    pub(super) fn has_chat(&self) -> bool {
        self.chat.is_some()
    }

    /// A warning about the end of the chat template's answers, for generation that stops at these tokens.
    pub fn generation_warning(&self, stops: &[u32]) -> Option<String> {
        let Prompt::Chat(template) = &self.prompt else {
            return None;
        };
        let behind = chat::behind_an_answer(template)?;
        let ids = self
            .tokenizer
            .encode_fast(behind.trim_start(), false)
            .ok()?;
        let end = ids.get_ids().first().copied();
        let end = end.filter(|id| self.special.contains(id));
        ends::generation_warning(self.tokenizer(), end, stops)
    }

    /// The ids of the prompt for `context`.
    ///
    /// # Errors
    ///
    /// Errors of the chat template or of the tokenizer (with `path` and `line`).
    pub fn prompt(&self, context: &str, path: &Path, line: usize) -> Result<Vec<u32>, DataError> {
        let text = self.prompt.render(context)?;
        Ok(self.begun(self.encode(&text, path, line)?))
    }

    /// `ids` with the tokens that begin a text, unless the text has them already.
    fn begun(&self, ids: Vec<u32>) -> Vec<u32> {
        if ids.starts_with(&self.before) {
            ids
        } else {
            [&self.before[..], &ids].concat()
        }
    }

    /// The ids of the completion: those of the answer, and the end token.
    ///
    /// # Errors
    ///
    /// As [`prompt`](Self::prompt).
    pub fn answer(&self, text: &str, path: &Path, line: usize) -> Result<Vec<u32>, DataError> {
        let mut ids = self.encode(text, path, line)?;
        match self.ends_at(&ids) {
            // White space behind the end token is not trained on.
            Some(end) => ids.truncate(end + 1),
            None => ids.push(self.end),
        }
        Ok(ids)
    }

    /// The position of the end token, if the text ends with it, apart from white space.
    fn ends_at(&self, ids: &[u32]) -> Option<usize> {
        let end = ids.iter().rposition(|id| *id == self.end)?;
        let behind = decoded(&self.tokenizer.tokenizer, &ids[end + 1..], false);
        behind.trim().is_empty().then_some(end)
    }

    /// A row as prompt and answer; of a conversation, the answer is the last assistant turn.
    ///
    /// # Errors
    ///
    /// As [`tokenize`](Self::tokenize); and for a plain text, which has no answer.
    pub fn question(&self, row: &Row, path: &Path) -> Result<Question, DataError> {
        let (line, prompt, target) = match &row.example {
            Example::Answer { target, .. } | Example::Instruction { output: target, .. } => (
                row.line,
                self.row_prompt(&row.example, path, row.line)?,
                target.clone(),
            ),
            Example::Conversation(conversation) => {
                let chat = self.chat(path, row.line)?;
                let (text, target) = chat::question(chat, conversation, path, row.line)?;
                (row.line, self.encode(&text, path, row.line)?, target)
            }
            Example::Text(_) => {
                return Err(DataError::NoQuestion { path: path.into() });
            }
        };
        if prompt.is_empty() {
            Err(DataError::EmptyPrompt {
                path: path.into(),
                line,
            })
        } else {
            Ok(Question {
                line,
                prompt,
                target,
            })
        }
    }

    /// The tokens of a row of the file `path`, whatever their number.
    ///
    /// # Errors
    ///
    /// A prompt without tokens, or an id outside a vocabulary of `vocab_size`, with file and line.
    pub fn tokenize(
        &self,
        row: &Row,
        path: &Path,
        vocab_size: usize,
    ) -> Result<TokenizedRow, DataError> {
        let tokenized = match &row.example {
            Example::Answer { target, .. } | Example::Instruction { output: target, .. } => {
                let mut ids = self.row_prompt(&row.example, path, row.line)?;
                let prompt_tokens = ids.len();
                if prompt_tokens == 0 {
                    return Err(DataError::EmptyPrompt {
                        path: path.into(),
                        line: row.line,
                    });
                }
                ids.extend(self.answer(target, path, row.line)?);
                TokenizedRow::answer(row.line, ids, prompt_tokens)
            }
            Example::Conversation(conversation) => {
                let chat = self.chat(path, row.line)?;
                let (text, turns) = chat::turns(chat, conversation, path, row.line)?;
                let encoding = self.encoding(&text, path, row.line)?;
                let is_special = |id| self.special.contains(&id);
                TokenizedRow {
                    line: row.line,
                    learned: chat::learned(&encoding, &text, &turns, &is_special),
                    ids: encoding.get_ids().to_vec(),
                }
            }
            Example::Text(text) => {
                let ids = self.begun(self.answer(text, path, row.line)?);
                TokenizedRow::answer(row.line, ids, 1)
            }
        };
        if tokenized.supervised_tokens() == 0 {
            return Err(DataError::TooShort {
                path: path.into(),
                line: row.line,
                tokens: tokenized.ids.len(),
            });
        }
        self.check(&tokenized.ids, vocab_size, path, row.line)?;
        Ok(tokenized)
    }

    /// Checks that a vocabulary of `vocab_size` has these tokens.
    ///
    /// # Errors
    ///
    /// [`DataError::TokenOutsideVocabulary`] with file and line.
    pub fn check(
        &self,
        ids: &[u32],
        vocab_size: usize,
        path: &Path,
        line: usize,
    ) -> Result<(), DataError> {
        match ids.iter().find(|id| **id as usize >= vocab_size) {
            None => Ok(()),
            Some(id) => Err(DataError::TokenOutsideVocabulary {
                path: path.into(),
                line,
                token: self.tokenizer().id_to_token(*id).unwrap_or_default(),
                id: *id,
                vocab_size,
            }),
        }
    }

    /// The text of the prompt of a row with an answer. Alpaca's instruction and input are two lines; with the raw template
    /// they have the form of FinLoRA's contexts, which were made from such rows.
    fn prompt_text<'a>(
        &'a self,
        example: &'a Example,
        path: &Path,
        line: usize,
    ) -> Result<Cow<'a, str>, DataError> {
        let (system, instruction, input) = match example {
            Example::Answer { context, .. } => return self.prompt.render(context),
            Example::Instruction {
                system,
                instruction,
                input,
                ..
            } => (system.as_deref(), instruction, input.as_deref()),
            Example::Conversation(_) | Example::Text(_) => return Ok("".into()),
        };
        if let Prompt::Instruct(template) = &self.prompt
            && (template.has_system() || system.is_none_or(str::is_empty))
        {
            return Ok(template.render(system, instruction, input).into());
        }
        if system.is_some_and(|system| !system.is_empty()) {
            let key = "system";
            return Err(DataError::Conversation {
                path: path.into(),
                line,
                message: LineError::NotSupported { key }.to_string(),
            });
        }
        let framed = matches!(self.prompt, Prompt::Raw);
        let context = match (framed, input) {
            (true, Some(input)) => {
                format!("Instruction: {instruction}\nInput: {input}\nAnswer: ")
            }
            (true, None) => format!("Instruction: {instruction}\nAnswer: "),
            (false, Some(input)) => format!("{instruction}\n{input}"),
            (false, None) => instruction.clone(),
        };
        Ok(self.prompt.render(&context)?.into_owned().into())
    }

    /// The ids of the prompt of a row with an answer.
    fn row_prompt(
        &self,
        example: &Example,
        path: &Path,
        line: usize,
    ) -> Result<Vec<u32>, DataError> {
        let text = self.prompt_text(example, path, line)?;
        Ok(self.begun(self.encode(&text, path, line)?))
    }

    /// Warnings about parts of the conversations that the chat template does not write.
    pub(super) fn unwritten(&self, rows: &[Row], path: &Path) -> Vec<String> {
        let chat = self.chat.as_ref();
        chat.map_or_else(Vec::new, |template| {
            unwritten::warnings(template, rows, path)
        })
    }

    /// Keys of messages that the chat template does not mention.
    pub(super) fn unread_keys(&self, rows: &[Row]) -> Vec<String> {
        let chat = self.chat.as_ref();
        chat.map_or_else(Vec::new, |template| unwritten::ignored(template, rows))
    }

    fn chat(&self, path: &Path, line: usize) -> Result<&ChatTemplate, DataError> {
        self.chat.as_ref().ok_or_else(|| DataError::Conversation {
            path: path.into(),
            line,
            message:
                "a conversation, but the model's folder has no chat template (\"chat_template\" in \
                      tokenizer_config.json, or chat_template.jinja)"
                    .into(),
        })
    }

    fn encode(&self, text: &str, path: &Path, line: usize) -> Result<Vec<u32>, DataError> {
        match self.tokenizer.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(failed(error, path, line)),
        }
    }

    /// [`encode`](Self::encode) with the byte offsets of each token.
    fn encoding(&self, text: &str, path: &Path, line: usize) -> Result<Encoding, DataError> {
        let encoding = self.tokenizer.encode(text);
        encoding.map_err(|error| failed(error, path, line))
    }
}

/// Adds the tokens that a model's other files name, with their ids, or after all others. For a token that is also in
/// `tokenizer.json`, the flags of the other files take precedence, as in transformers.
fn add_tokens(tokenizer: &mut Tokenizer, files: &ModelFiles) -> Result<(), DataError> {
    for (id, token) in files.added_tokens()? {
        let known = tokenizer.get_added_tokens_decoder();
        if known.get(&id).is_some_and(|known| same(known, &token)) {
            continue;
        }
        let content = token.content.clone();
        let added = tokenizer.add_tokens([token]);
        added.map_err(|error| files.error("tokenizer.json", error.to_string()))?;
        let got = tokenizer.token_to_id(&content);
        if got != Some(id) {
            let got = got.map_or_else(|| "none".into(), |got| got.to_string());
            let message = format!(
                "the added token {content:?} has id {id} in the model's files, and would get id {got} behind those of \
                 tokenizer.json; save the tokenizer with a newer transformers, which writes all tokens into \
                 tokenizer.json"
            );
            return Err(files.error("tokenizer_config.json", message));
        }
    }
    for token in files.named_tokens()? {
        let known = tokenizer.get_added_tokens_decoder();
        if known.values().any(|known| known.content == token.content) {
            continue;
        }
        let added = tokenizer.add_tokens([token]);
        added.map_err(|error| files.error("tokenizer_config.json", error.to_string()))?;
    }
    tokenizer.set_encode_special_tokens(files.splits_special_tokens()?);
    Ok(())
}

/// Whether two tokens have the same flags; the crate's own comparison compares the texts only.
fn same(a: &AddedToken, b: &AddedToken) -> bool {
    let flags = |token: &AddedToken| {
        [
            token.single_word,
            token.lstrip,
            token.rstrip,
            token.normalized,
            token.special,
        ]
    };
    a.content == b.content && flags(a) == flags(b)
}

fn failed(message: String, path: &Path, line: usize) -> DataError {
    DataError::Tokenize {
        path: path.into(),
        line,
        message,
    }
}

/// The template that renders the rows of a format: the chat template for conversations, none for texts, else the
/// configured one. `None`: format and configured template do not fit.
pub fn effective_template(template: &PromptTemplate, format: Format) -> Option<PromptTemplate> {
    match (format, template) {
        (Format::Messages, PromptTemplate::Raw | PromptTemplate::Chat) => {
            Some(PromptTemplate::Chat)
        }
        (Format::Text, PromptTemplate::Raw) => Some(PromptTemplate::Raw),
        (Format::Messages | Format::Text, _) => None,
        _ => Some(template.clone()),
    }
}

/// The special tokens that the post-processor puts before a text.
fn tokens_before(tokenizer: &Guarded) -> Result<Vec<u32>, String> {
    let with = tokenizer.encode_fast("a", true)?;
    let without = tokenizer.encode_fast("a", false)?;
    let (with, without) = (with.get_ids(), without.get_ids());
    let start = if without.is_empty() {
        // A tokenizer without "a": all tokens are special, and the first one precedes the text.
        usize::from(!with.is_empty())
    } else {
        with.windows(without.len())
            .position(|ids| ids == without)
            .unwrap_or(0)
    };
    Ok(with[..start].to_vec())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The files of a model whose words are `<unk>` 0, `<s>` 1, `</s>` 2, then those of `words`; `bos`: its
    /// post-processor puts `<s>` before and `</s>` behind a text.
    pub(crate) fn word_files(words: &[&str], bos: bool) -> ModelFiles {
        let all = ["<unk>", "<s>", "</s>"].iter().chain(words);
        let vocab: serde_json::Map<_, _> = all
            .enumerate()
            .map(|(id, word)| (word.to_string(), id.into()))
            .collect();
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        };
        let post_processor = serde_json::json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
                               "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}});
        let tokenizer = serde_json::json!({
            "version": "1.0",
            "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": null,
            "added_tokens": [special(1, "<s>"), special(2, "</s>")],
            "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": if bos { post_processor } else { serde_json::Value::Null },
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        });
        ModelFiles {
            folder: "model".into(),
            tokenizer: tokenizer.to_string().into_bytes(),
            tokenizer_config: Some(r#"{"eos_token": "</s>", "bos_token": "<s>"}"#.into()),
            ..ModelFiles::default()
        }
    }

    fn row(context: &str, target: &str) -> Row {
        Row::answer(7, context, target)
    }

    const WORDS: [&str; 5] = ["good", "news", "positive", "[INST]", "[/INST]"];

    fn tokenize(
        files: &ModelFiles,
        template: PromptTemplate,
        row: &Row,
    ) -> Result<TokenizedRow, DataError> {
        RowTokenizer::new(files, &template)?.tokenize(row, Path::new("data.jsonl"), 8)
    }

    #[test]
    fn the_target_and_the_end_token_are_supervised_and_nothing_is_cut() {
        let files = word_files(&WORDS, false);
        let row = row("good news good news", "positive");
        let tokenized = tokenize(&files, PromptTemplate::Raw, &row).unwrap();
        assert_eq!(tokenized.ids, [3, 4, 3, 4, 5, 2]);
        assert_eq!((tokenized.line, tokenized.prompt_tokens()), (7, 4));
        assert_eq!(tokenized.supervised().collect::<Vec<_>>(), [(4, 5), (5, 2)]);
        let tokenized = tokenize(&files, PromptTemplate::Inst, &row).unwrap();
        assert_eq!(tokenized.ids, [6, 3, 4, 3, 4, 7, 5, 2]);
    }

    #[test]
    fn a_prompt_begins_with_the_tokenizers_bos_and_a_target_never_does() {
        let files = word_files(&WORDS, true);
        let raw = tokenize(&files, PromptTemplate::Raw, &row("good news", "positive")).unwrap();
        assert_eq!(
            (raw.ids.as_slice(), raw.prompt_tokens()),
            ([1, 3, 4, 5, 2].as_slice(), 3)
        );
        let empty = tokenize(&files, PromptTemplate::Raw, &row("", "positive")).unwrap();
        assert_eq!(
            (empty.ids.as_slice(), empty.prompt_tokens()),
            ([1, 5, 2].as_slice(), 1)
        );
    }

    #[test]
    fn special_tokens_that_a_text_was_written_with_are_not_added_once_more() {
        let files = word_files(&WORDS, true);
        let ids = |example: Example| {
            let row = Row { line: 7, example };
            tokenize(&files, PromptTemplate::Raw, &row).unwrap().ids
        };
        let text = |text: &str| ids(Example::Text(text.into()));
        assert_eq!(text("good news"), [1, 3, 4, 2]);
        for written in [
            "<s> good news",
            "good news </s>",
            "<s> good news </s>",
            "<s> good news </s> \n",
        ] {
            assert_eq!(text(written), [1, 3, 4, 2], "{written:?}");
        }
        // An end in the middle is none.
        assert_eq!(text("good </s> news"), [1, 3, 2, 4, 2]);
        let answer = ids(row("<s> good", "news </s>").example);
        assert_eq!(answer, [1, 3, 4, 2]);
    }

    #[test]
    fn a_chat_template_writes_its_special_tokens_itself() {
        let mut files = word_files(&WORDS, true);
        files.chat_template = Some("{{ bos_token }} {{ messages[0].content }} [/INST]".into());
        let chat = tokenize(&files, PromptTemplate::Chat, &row("news", "positive")).unwrap();
        assert_eq!(
            (chat.ids.as_slice(), chat.prompt_tokens()),
            ([1, 4, 7, 5, 2].as_slice(), 3)
        );
    }

    #[test]
    fn a_prompt_without_tokens_is_an_error() {
        let files = word_files(&WORDS, false);
        let error = tokenize(&files, PromptTemplate::Raw, &row("", "positive")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("data.jsonl:7: the prompt has no tokens"),
            "{error}"
        );
    }

    #[test]
    fn a_token_that_the_model_does_not_have_is_named() {
        let files = word_files(&[&WORDS[..], &["outside"]].concat(), false);
        let error = tokenize(
            &files,
            PromptTemplate::Raw,
            &row("good outside", "positive"),
        )
        .unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("data.jsonl:7: token \"outside\" has id 8"),
            "{error}"
        );
        assert!(error.contains("8 tokens"), "{error}");
    }

    #[test]
    fn tokens_that_only_other_files_know_are_whole() {
        let mut files = word_files(&WORDS, false);
        let token = |content: &str, special: bool| {
            serde_json::json!({"content": content, "special": special, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        };
        let config = |id: &str| {
            let decoder = serde_json::json!({"2": token("</s>", true), "8": token("<a>", true),
                id: token("<b>", false)});
            serde_json::json!({"eos_token": "</s>", "added_tokens_decoder": decoder}).to_string()
        };
        let ids = |files: &ModelFiles| {
            let row = row("good <b>news", "<a>");
            let tokenizer = RowTokenizer::new(files, &PromptTemplate::Raw);
            tokenizer
                .and_then(|it| it.tokenize(&row, Path::new("a"), 10))
                .map(|row| row.ids)
        };
        files.tokenizer_config = Some(config("9").into());
        assert_eq!(ids(&files).unwrap(), [3, 9, 4, 8, 2]);
        files.tokenizer_config = Some(config("12").into());
        let error = ids(&files).unwrap_err().to_string();
        assert!(
            error.contains("<b>") && error.contains("id 12") && error.contains("id 9"),
            "{error}"
        );
        // Files of older versions of transformers.
        files.tokenizer_config = Some(r#"{"eos_token": "<old>"}"#.into());
        files.special_tokens_map = Some(r#"{"eos_token": {"content": "</s>"}}"#.into());
        files.added_tokens = Some(r#"{"<b>": 9, "<a>": 8}"#.into());
        assert_eq!(ids(&files).unwrap(), [3, 9, 4, 8, 2]);
    }

    #[test]
    fn a_tokenizer_that_is_broken_or_fails_says_where() {
        let mut files = word_files(&WORDS, false);
        files.tokenizer.truncate(40);
        let error = RowTokenizer::new(&files, &PromptTemplate::Raw)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("tokenizer.json") && error.contains("not a valid tokenizer"),
            "{error}"
        );
        let files = word_files(&WORDS, false);
        let text = String::from_utf8(files.tokenizer.clone()).unwrap();
        let text = text.replace("\"unk_token\":\"<unk>\"", "\"unk_token\":\"<none>\"");
        let files = ModelFiles {
            tokenizer: text.into(),
            ..files
        };
        let error = tokenize(&files, PromptTemplate::Raw, &row("never", "positive"));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("model"), "{error}");
    }
}

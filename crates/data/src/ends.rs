//! Whether answers end with a token at which generation stops. Otherwise the adapter never learns to stop.

use tokenizers::Tokenizer;

use super::dataset::Dataset;
use super::model_files::ModelFiles;
use super::tokenize::RowTokenizer;

/// A warning about the end of the answers of a chat template; `None` if an answer ends with a token at which generation
/// stops.
pub(super) fn warning(
    train: &Dataset,
    files: &ModelFiles,
    tokenizer: &RowTokenizer,
) -> Option<String> {
    let stops = files.stops(tokenizer.end_token());
    let last = |row: &super::TokenizedRow| {
        let range = row.learned.last()?;
        Some(row.ids[range.end - 1])
    };
    let ends = train.rows.iter().filter_map(last);
    let mut ends = ends.peekable();
    let first = *ends.peek()?;
    if ends.any(|id| stops.contains(&id)) {
        return None;
    }
    let names = names(tokenizer.tokenizer(), &stops);
    let end = tokenizer.tokenizer().id_to_token(first).unwrap_or_default();
    Some(if tokenizer.is_special(first) {
        format!(
            "every answer ends with {end:?}, at which generation does not stop: the model's files name {names} as the end. \
         Set eos_token in tokenizer_config.json and eos_token_id in generation_config.json to it, or the model does \
         not stop after its answers"
        )
    } else {
        format!(
            "no answer ends with a token that ends a text ({names}): the chat template writes none behind an answer, so \
         the adapter never learns to stop. Write the end token into the template behind the assistant's content"
        )
    })
}

/// The texts of the tokens as a list.
fn names(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let name = |id: &u32| match tokenizer.id_to_token(*id) {
        Some(token) => format!("{token:?}"),
        None => id.to_string(),
    };
    let names: Vec<String> = ids.iter().map(name).collect();
    names.join(", ")
}

/// [`warning`] for generation with the chat template: `end` is the first token that the template writes behind an answer,
/// if any.
pub(super) fn generation_warning(
    tokenizer: &Tokenizer,
    end: Option<u32>,
    stops: &[u32],
) -> Option<String> {
    let names = names(tokenizer, stops);
    match end {
        Some(end) if stops.contains(&end) => None,
        Some(end) => Some(format!(
            "the chat template ends an answer with {:?}, at which generation does not stop (it stops at {names}); --stop \
             with that text ends answers there",
            tokenizer.id_to_token(end).unwrap_or_default()
        )),
        None => Some(format!(
            "the chat template writes no token behind an answer, so generation may not stop (it stops \
             at {names}); --max-new-tokens and --stop limit it"
        )),
    }
}

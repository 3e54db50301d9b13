//! Whether what is learned ends, and whether generation stops there: an adapter that never learned an end writes on.

use tokenizers::Tokenizer;

use super::dataset::Dataset;
use super::model_files::ModelFiles;
use super::tokenize::RowTokenizer;

/// What the user should know of how the answers of a chat template end; nothing where one of them ends with a token at
/// which generation stops.
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
         Set eos_token in tokenizer_config.json and eos_token_id in generation_config.json to it, or the model writes \
         on after its answers"
        )
    } else {
        format!(
            "no answer ends with a token that ends a text ({names}): the chat template writes none behind an answer, so that \
         the adapter never learns to stop. Write the end token into the template behind the assistant's content"
        )
    })
}

/// The tokens' texts in a list.
fn names(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let name = |id: &u32| match tokenizer.id_to_token(*id) {
        Some(token) => format!("{token:?}"),
        None => id.to_string(),
    };
    let names: Vec<String> = ids.iter().map(name).collect();
    names.join(", ")
}

/// As [`warning`], for a model that writes an answer under its chat template: `end` is the first token that the template
/// puts behind one, if any.
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
            "the chat template writes no token behind an answer, so that there may be no end to stop at (generation stops \
             at {names}); --max-new-tokens and --stop limit it"
        )),
    }
}

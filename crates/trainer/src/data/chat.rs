//! Which part of a rendered conversation the assistant says.
//!
//! A chat template is a program, so what it writes for one turn is found by running it: on the messages
//! before the turn, with the prompt for an answer; on those up to the turn; and on all. Where the first two
//! are beginnings of the third, what the second has more than the first is the turn. Where they are not (a
//! template that drops thoughts from earlier turns, for one), no mask would be right, and that is an error.

use std::ops::Range;
use std::path::Path;

use tokenizers::Encoding;

use super::conversation::Conversation;
use super::error::DataError;
use super::template::ChatTemplate;

/// The rendered conversation, and where in it (in bytes) the turns to learn are, each with what ends it.
pub(super) fn turns(
    template: &ChatTemplate,
    conversation: &Conversation,
    path: &Path,
    line: usize,
) -> Result<(String, Vec<Range<usize>>), DataError> {
    let Conversation {
        messages, tools, ..
    } = conversation;
    let failed = |message: String| DataError::Conversation {
        path: path.into(),
        line,
        message,
    };
    let render = |count: usize, prompts: bool| {
        let text = template.render(&messages[..count], tools.as_ref(), prompts);
        text.map_err(|error| failed(error.to_string()))
    };
    let whole = render(messages.len(), false)?;
    let mut turns = Vec::new();
    for turn in conversation.assistant_turns() {
        let before = render(turn, true)?;
        let with = render(turn + 1, false)?;
        for part in [&before, &with] {
            if !whole.starts_with(part.as_str()) {
                let same = whole.bytes().zip(part.bytes());
                let same = same.take_while(|(a, b)| a == b).count();
                return Err(failed(format!(
                    "the chat template renders the conversation up to messages[{turn}] in another way than as a \
                     part of the whole (the same for {same} bytes), so that it cannot be told what of it is \
                     learned; write one row for each turn to learn, with that turn last"
                )));
            }
        }
        if with.len() <= before.len() {
            return Err(failed(format!(
                "the chat template writes nothing for messages[{turn}]"
            )));
        }
        turns.push(before.len()..with.len());
    }
    Ok((whole, turns))
}

/// The conversation up to its last turn of the assistant, and what that turn says.
pub(super) fn question(
    template: &ChatTemplate,
    conversation: &Conversation,
    path: &Path,
    line: usize,
) -> Result<(String, String), DataError> {
    let Conversation {
        messages, tools, ..
    } = conversation;
    let last = conversation.assistant_turns().next_back().unwrap_or(0);
    let text = template.render(&messages[..last], tools.as_ref(), true);
    let text = text.map_err(|error| DataError::Conversation {
        path: path.into(),
        line,
        message: error.to_string(),
    })?;
    let target = messages[last]["content"].as_str().unwrap_or_default();
    Ok((text, target.to_string()))
}

/// The positions of the tokens that lie in the turns, if only in part. White space that a template puts
/// behind the token that ends a turn (a line break before the next one) is nobody's answer and left out.
pub(super) fn learned(
    encoding: &Encoding,
    text: &str,
    turns: &[Range<usize>],
    is_special: &dyn Fn(u32) -> bool,
) -> Vec<Range<usize>> {
    let offsets = encoding.get_offsets();
    let ids = encoding.get_ids();
    let mut learned: Vec<Range<usize>> = Vec::new();
    for turn in turns {
        // Tokens come in the order of the text.
        let start = offsets.partition_point(|(_, end)| *end <= turn.start);
        let mut end = offsets.partition_point(|(start, _)| *start < turn.end);
        let is_space = |token: &usize| {
            let (from, to) = offsets[*token];
            text.get(from..to)
                .is_some_and(|text| text.trim().is_empty())
        };
        let spaces = (start..end).rev().take_while(is_space).count();
        if spaces > 0 && end - spaces > start && is_special(ids[end - spaces - 1]) {
            end -= spaces;
        }
        // Nothing predicts the first token; a token in two turns is learned once.
        let start = start
            .max(1)
            .max(learned.last().map_or(0, |range| range.end));
        if start < end {
            learned.push(start..end);
        }
    }
    learned
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::format::{Example, Format};
    use super::super::model_files::ModelFiles;
    use super::super::rows::Row;
    use super::super::tokenize::tests::word_files;
    use super::super::tokenize::{RowTokenizer, TokenizedRow};
    use super::*;
    use crate::config::PromptTemplate;

    const WORDS: [&str; 8] = ["U", "A", "hello", "there", "yes", "no", "E", "S"];
    const TEMPLATE: &str = "{% for m in messages %}{{ {'user': 'U', 'assistant': 'A', 'system': 'S'}[m.role] }} \
        {{ m.content }} </s> \n{% endfor %}{% if add_generation_prompt %}A {% endif %}";

    fn files(template: &str) -> ModelFiles {
        ModelFiles {
            chat_template: Some(template.into()),
            ..word_files(&WORDS, true)
        }
    }

    fn conversation(turns: &[(&str, &str)], learn_from: usize) -> Row {
        let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
        let messages: Vec<Value> = turns.iter().map(message).collect();
        Row {
            line: 7,
            example: Example::Conversation(Conversation {
                messages,
                tools: None,
                learn_from,
            }),
        }
    }

    fn tokenizer(template: &str) -> RowTokenizer {
        let files = files(template);
        let mut tokenizer = RowTokenizer::new(&files, &PromptTemplate::Raw).unwrap();
        let path = Path::new("data.jsonl");
        tokenizer
            .prepare(&files, &PromptTemplate::Raw, Format::Messages, path)
            .unwrap();
        tokenizer
    }

    fn tokenize(template: &str, row: &Row) -> Result<TokenizedRow, String> {
        let tokenized = tokenizer(template).tokenize(row, Path::new("data.jsonl"), 99);
        tokenized.map_err(|error| error.to_string())
    }

    fn learned_text(row: &TokenizedRow) -> String {
        let all: Vec<&str> = ["<unk>", "<s>", "</s>"].into_iter().chain(WORDS).collect();
        let words: Vec<&str> = row.supervised().map(|(_, id)| all[id as usize]).collect();
        words.join(" ")
    }

    const TURNS: [(&str, &str); 5] = [
        ("system", "no"),
        ("user", "hello"),
        ("assistant", "yes there"),
        ("user", "there"),
        ("assistant", "no"),
    ];

    #[test]
    fn every_turn_of_the_assistant_is_learned_with_its_end_and_nothing_else() {
        let row = tokenize(TEMPLATE, &conversation(&TURNS, 0)).unwrap();
        assert_eq!(learned_text(&row), "yes there </s> no </s>");
        assert_eq!(row.learned.len(), 2);
        assert_eq!(row.prompt_tokens(), row.learned[0].start);
        // The chat template writes special tokens itself: no <s> of the post-processor.
        assert_eq!(row.ids[0], 10);
        let only_last = tokenize(TEMPLATE, &conversation(&TURNS, 3)).unwrap();
        assert_eq!(
            (learned_text(&only_last).as_str(), &only_last.ids),
            ("no </s>", &row.ids)
        );
    }

    #[test]
    fn a_template_without_an_end_token_keeps_its_own_end() {
        let template = "{% for m in messages %}{{ m.content }} E {% endfor %}";
        let row = tokenize(template, &conversation(&TURNS[1..3], 0)).unwrap();
        assert_eq!(learned_text(&row), "yes there E");
    }

    #[test]
    fn an_answer_that_a_conversation_begins_with_has_no_first_token_to_learn() {
        let template = "{% for m in messages %}{{ m.content }} </s> {% endfor %}";
        let row = tokenize(template, &conversation(&[("assistant", "yes there")], 0)).unwrap();
        assert_eq!(learned_text(&row), "there </s>");
    }

    #[test]
    fn a_template_that_changes_earlier_turns_is_refused_with_the_line() {
        let drops = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }} {% endif %}\
            {% endfor %}";
        let error = tokenize(drops, &conversation(&TURNS[1..], 0)).unwrap_err();
        assert!(
            error.starts_with("data.jsonl:7: the chat template"),
            "{error}"
        );
        assert!(
            error.contains("messages[1]") && error.contains("one row for each"),
            "{error}"
        );
        let silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}";
        let error = tokenize(silent, &conversation(&TURNS[1..], 0)).unwrap_err();
        assert!(error.contains("writes nothing for messages[1]"), "{error}");
        let refuses = "{{ raise_exception('roles must alternate') }}";
        let error = tokenize(refuses, &conversation(&TURNS, 0)).unwrap_err();
        assert!(
            error.contains("data.jsonl:7") && error.contains("must alternate"),
            "{error}"
        );
    }

    #[test]
    fn the_question_of_a_conversation_is_its_last_answers() {
        let row = conversation(&TURNS, 0);
        let path = Path::new("data.jsonl");
        let question = tokenizer(TEMPLATE).question(&row, path).unwrap();
        let whole = tokenize(TEMPLATE, &row).unwrap();
        assert_eq!(question.target, "no");
        assert_eq!(question.prompt, whole.ids[..whole.learned[1].start]);
    }

    #[test]
    fn a_model_without_a_chat_template_or_another_template_is_an_error() {
        let path = Path::new("data.jsonl");
        let prepare = |files: &ModelFiles, template: &PromptTemplate| {
            let mut tokenizer = RowTokenizer::new(files, template).unwrap();
            let prepared = tokenizer.prepare(files, template, Format::Messages, path);
            prepared.unwrap_err().to_string()
        };
        let error = prepare(&word_files(&WORDS, true), &PromptTemplate::Raw);
        assert!(error.contains("no chat template"), "{error}");
        let error = prepare(&files(TEMPLATE), &PromptTemplate::Inst);
        assert!(
            error.contains("\"inst\"") && error.contains("\"chat\""),
            "{error}"
        );
    }
}

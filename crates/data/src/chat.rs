//! Which part of a rendered conversation is the assistant's.
//!
//! If the template marks it (`{% generation %}`, transformers' tag), the marks decide. Otherwise the template is rendered
//! three times to find a turn: with the messages before the turn and the generation prompt; with the messages up to and
//! including the turn; and with all messages. If the first two texts are prefixes of the third, the turn is what the
//! second text adds to the first. If the first text is not a prefix (its generation prompt opens `<think>`, which the
//! answer in the data does not; or there are no messages before the turn), the turn begins where a text that replaces it
//! appears. If the second text is not a prefix (a template may drop the reasoning of earlier turns), no mask is right,
//! and that is an error.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use tokenizers::Encoding;

use super::conversation::Conversation;
use super::error::DataError;
use super::template::ChatTemplate;

/// The text that replaces a turn to find where the turn begins. No template depends on it.
const PROBE: &str = "\u{10fade}";

/// The rendered conversation, and the byte ranges of the turns in the loss, each with its end token.
pub(super) fn turns(
    template: &ChatTemplate,
    conversation: &Conversation,
    path: &Path,
    line: usize,
) -> Result<(String, Turns), DataError> {
    let failed = |message: String| DataError::Conversation {
        path: path.into(),
        line,
        message,
    };
    let rendered = |messages: &[Value], prompts: bool| {
        let rendered = template.render(messages, conversation, prompts);
        rendered.map_err(|error| failed(error.to_string()))
    };
    let messages = &conversation.messages[..];
    let whole = rendered(messages, false)?;
    if template.marks() {
        let turns = marked(conversation, &whole.marked).map_err(failed)?;
        let exact = true;
        return Ok((whole.text, Turns { turns, exact }));
    }
    let whole = whole.text;
    let mut turns = Vec::new();
    for turn in conversation.assistant_turns() {
        let with = rendered(&messages[..=turn], false)?.text;
        if !whole.starts_with(with.as_str()) {
            let same = whole.bytes().zip(with.bytes());
            let same = same.take_while(|(a, b)| a == b).count();
            return Err(failed(format!(
                "the chat template renders the conversation up to messages[{turn}] differently alone than as part of the \
                 whole conversation (the first {same} bytes are equal), so the loss mask of this turn is unknown; write \
                 one example per turn to train on, with that turn last"
            )));
        }
        // Not every template renders an empty list of messages.
        let before = template.render(&messages[..turn], conversation, true);
        let before = before.ok().map(|before| before.text);
        let start = match before.filter(|before| with.starts_with(before.as_str())) {
            Some(before) => before.len(),
            None => {
                let start = probed(template, conversation, turn, &with);
                start.map_err(failed)?
            }
        };
        if with.len() <= start {
            return Err(failed(format!(
                "the chat template writes nothing for messages[{turn}]"
            )));
        }
        turns.push(start..with.len());
    }
    let exact = false;
    Ok((whole, Turns { turns, exact }))
}

/// The byte ranges of a text that are in the loss.
#[derive(Debug)]
pub(super) struct Turns {
    turns: Vec<Range<usize>>,
    /// Whether the ranges are exact, including white space at their ends.
    exact: bool,
}

/// The marks of the turns in the loss.
fn marked(
    conversation: &Conversation,
    marks: &[Range<usize>],
) -> Result<Vec<Range<usize>>, String> {
    let all: Vec<usize> = conversation.turns().collect();
    let learned: Vec<usize> = conversation.assistant_turns().collect();
    if all == learned {
        return Ok(marks.to_vec());
    }
    if marks.len() != all.len() {
        return Err(format!(
            "the chat template marks {} parts as the assistant's ({{% generation %}}), and the conversation has {} \
             assistant turns, some of which are not in the loss: the parts cannot be matched to turns; mark every turn as \
             trained, or remove {{% generation %}} from the chat template",
            marks.len(),
            all.len()
        ));
    }
    let marks = all
        .iter()
        .zip(marks)
        .filter(|(turn, _)| learned.contains(turn));
    Ok(marks.map(|(_, mark)| mark.clone()).collect())
}

/// Where a turn begins in `with`, the conversation up to the turn: where a text that replaces it appears.
fn probed(
    template: &ChatTemplate,
    conversation: &Conversation,
    turn: usize,
    with: &str,
) -> Result<usize, String> {
    let mut messages = conversation.messages[..=turn].to_vec();
    messages[turn]["content"] = PROBE.into();
    let probe = template.render(&messages, conversation, false);
    let probe = probe.map_err(|error| error.to_string())?.text;
    let start = probe.find(PROBE).filter(|start| {
        let same = probe.as_bytes().get(..*start) == with.as_bytes().get(..*start);
        same && probe.matches(PROBE).count() == 1
    });
    start.ok_or_else(|| {
        format!(
            "it is unknown where messages[{turn}] begins in the text of the chat template: the generation prompt is not a \
             prefix of the text, and the template writes something before the turn that depends on it; mark the \
             assistant's turns in the template with {{% generation %}}"
        )
    })
}

/// What a template writes behind an answer; `None` if it does not render the conversation.
pub(super) fn behind_an_answer(template: &ChatTemplate) -> Option<String> {
    let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
    let messages = [message("user", "a"), message("assistant", PROBE)];
    let rendered = template.render(&messages, &Conversation::default(), false);
    let text = rendered.ok()?.text;
    text.rsplit_once(PROBE)
        .map(|(_, behind)| behind.to_string())
}

/// The conversation up to its last assistant turn, and the text of that turn.
pub(super) fn question(
    template: &ChatTemplate,
    conversation: &Conversation,
    path: &Path,
    line: usize,
) -> Result<(String, String), DataError> {
    let messages = &conversation.messages;
    let last = conversation.assistant_turns().next_back().unwrap_or(0);
    let rendered = template.render(&messages[..last], conversation, true);
    let text = rendered.map_err(|error| DataError::Conversation {
        path: path.into(),
        line,
        message: error.to_string(),
    })?;
    let target = messages[last].get("content").and_then(Value::as_str);
    Ok((text.text, target.unwrap_or_default().to_string()))
}

/// The positions of the tokens that lie in the turns, at least in part. White space that a template writes
/// behind the end token of a turn (a line break before the next one) is not part of the answer and left out.
pub(super) fn learned(
    encoding: &Encoding,
    text: &str,
    Turns { turns, exact }: &Turns,
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
        if !exact && spaces > 0 && end - spaces > start && is_special(ids[end - spaces - 1]) {
            end -= spaces;
        }
        // No token predicts the first one. A token in two turns counts once.
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
    use crate::PromptTemplate;

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
                learn_from,
                ..Conversation::default()
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
            error.contains("messages[1]") && error.contains("one example per turn"),
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
    fn a_prompt_for_an_answer_that_opens_thoughts_is_no_part_of_the_answer() {
        let template = TEMPLATE.replace("A {% endif %}", "A E {% endif %}");
        let row = tokenize(&template, &conversation(&TURNS, 0)).unwrap();
        assert_eq!(learned_text(&row), "yes there </s> no </s>");
        // Where the answer has them too, they are given, as in generation.
        let thinks = [("user", "hello"), ("assistant", "E yes")];
        let row = tokenize(&template, &conversation(&thinks, 0)).unwrap();
        assert_eq!(learned_text(&row), "yes </s>");
    }

    #[test]
    fn a_conversation_may_begin_with_the_assistant() {
        let needs = "{% if messages[0].role == 'system' %}{% endif %}";
        let turns = [("assistant", "yes"), ("user", "hello"), ("assistant", "no")];
        let row = tokenize(&format!("{needs}{TEMPLATE}"), &conversation(&turns, 0)).unwrap();
        assert_eq!(learned_text(&row), "yes </s> no </s>");
    }

    #[test]
    fn marks_of_the_template_say_what_is_learned() {
        let marks = "{% for m in messages %}{% if m.role == 'assistant' %}A {% generation %}{{ m.content }} </s> \
            {% endgeneration %}{% else %}U {{ m.content }} {% endif %}{% endfor %}\
            {% if add_generation_prompt %}A E {% endif %}";
        let all = tokenize(marks, &conversation(&TURNS, 0)).unwrap();
        assert_eq!(learned_text(&all), "yes there </s> no </s>");
        let last = tokenize(marks, &conversation(&TURNS, 3)).unwrap();
        assert_eq!(
            (learned_text(&last).as_str(), &last.ids),
            ("no </s>", &all.ids)
        );
        let mut given = conversation(&TURNS, 0);
        if let Example::Conversation(conversation) = &mut given.example {
            conversation.given = vec![2];
        }
        assert_eq!(learned_text(&tokenize(marks, &given).unwrap()), "no </s>");
        // One mark around everything cannot be divided.
        let one = "{% generation %}{% for m in messages %}{{ m.content }} {% endfor %}{% endgeneration %}";
        let error = tokenize(one, &conversation(&TURNS, 3)).unwrap_err();
        assert!(
            error.contains("marks 1 parts") && error.contains("2 assistant turns"),
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

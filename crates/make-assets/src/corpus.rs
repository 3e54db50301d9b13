//! Text to train the tokenizer and the base model on: news and other short texts, without sentiments.
//!
//! A base model should know the language and the form of a prompt, but not the task. So no sentence
//! is ever followed by its label, and `negative`, `neutral` and `positive` occur only where they
//! are not about news: in the fine-tuning instruction (which is never answered), in exercises on
//! single words, and in sentences about numbers. As in real pretraining text, most news is followed
//! by the market's reaction, which makes the sentiment worth learning.

use std::collections::HashSet;

use super::draw::Draw;
use super::news::{News, Sentiment, company, news, reaction};

/// A text of the corpus. Prompt and answer are tokenized separately, as the trainer does with
/// examples.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Document {
    pub prompt: String,
    /// The text that follows from the prompt: an answer, or the market's reaction. May be empty.
    pub answer: String,
}

impl Document {
    fn text(prompt: impl Into<String>) -> Self {
        let (prompt, answer) = (prompt.into(), String::new());
        Self { prompt, answer }
    }
}

/// FinLoRA's prompt for a sentence's sentiment.
pub(crate) fn sentiment_prompt(sentence: &str) -> String {
    question("What is the sentiment of this news?", &LABELS, sentence)
}

const LABELS: [&str; 3] = ["negative", "neutral", "positive"];

/// Lists of words for exercises that resemble the task, and are not about news.
const WORD_LISTS: [[&str; 3]; 6] = [
    LABELS,
    LABELS,
    ["north", "south", "east"],
    ["small", "medium", "large"],
    ["early", "late", "never"],
    ["red", "green", "blue"],
];

const NUMBER_FACTS: [&str; 6] = [
    "A number above zero is positive.",
    "A number below zero is negative.",
    "Zero is neither positive nor negative.",
    "A positive number times a negative number is a negative number.",
    "Water is neutral: it is neither an acid nor a base.",
    "A neutral country takes no side.",
];

/// Draws a document. It contains none of the sentences in `held_out`, those of the data set.
pub(crate) fn document(draw: &mut Draw, held_out: &HashSet<String>) -> Document {
    let (news, sentiment) = loop {
        let sentiment = *draw.choose(&Sentiment::ALL);
        let news = news(sentiment, draw);
        if !held_out.contains(&news.text) {
            break (news, sentiment);
        }
    };
    match draw.below(100) {
        0..78 => Document {
            prompt: news.text,
            answer: format!(" {}", reaction(sentiment, draw)),
        },
        78..82 => Document::text(sentiment_prompt(&news.text).replace("\nAnswer: ", "\n")),
        82..90 => about_the_company(&news, draw),
        90..98 => about_a_word(draw),
        _ => Document::text(*draw.choose(&NUMBER_FACTS)),
    }
}

fn question(question: &str, choices: &[&str], input: &str) -> String {
    let choices = choices.join("/");
    format!(
        "Instruction: {question} Please choose an answer from {{{choices}}}.\nInput: {input}\nAnswer: "
    )
}

fn about_the_company(news: &News, draw: &mut Draw) -> Document {
    let others = [company(draw), company(draw)];
    let mut choices = [&news.company, &others[0], &others[1]].map(String::as_str);
    draw.shuffle(&mut choices);
    Document {
        prompt: question("Which company is in this news?", &choices, &news.text),
        answer: news.company.clone(),
    }
}

fn about_a_word(draw: &mut Draw) -> Document {
    let words = draw.choose(&WORD_LISTS);
    let word = *draw.choose(words);
    Document {
        prompt: question(
            "What is the word in this text?",
            words,
            &format!("The word is {word}."),
        ),
        answer: word.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_finloras() {
        assert_eq!(
            sentiment_prompt("Sales rose."),
            "Instruction: What is the sentiment of this news? Please choose an answer from \
             {negative/neutral/positive}.\nInput: Sales rose.\nAnswer: "
        );
    }

    #[test]
    fn no_news_is_answered_with_a_sentiment() {
        let mut draw = Draw::new(9);
        let mut labels = 0;
        for _ in 0..5000 {
            let Document { prompt, answer } = document(&mut draw, &HashSet::new());
            if prompt.contains("sentiment") {
                assert!(answer.is_empty() && !prompt.contains("Answer"), "{prompt}");
            }
            if LABELS.contains(&answer.as_str()) {
                labels += 1;
                assert!(
                    prompt.contains(&format!("Input: The word is {answer}.")),
                    "{prompt}"
                );
            }
        }
        assert!(labels > 0);
    }
}

//! The embedded data set: examples in FinLoRA's format, `{"context", "target"}`.

use std::collections::HashSet;

use serde::Serialize;

use super::corpus::sentiment_prompt;
use super::draw::Draw;
use super::news::{Sentiment, news};

/// Training examples.
const TRAIN_ROWS: usize = 1_800;
/// Validation examples; their sentences are not in the training data.
const VALIDATION_ROWS: usize = 300;

/// The text of both files, one JSON object per line.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DataSet {
    pub train: String,
    pub validation: String,
    /// The sentences of both.
    pub sentences: HashSet<String>,
}

#[derive(Serialize)]
struct Row {
    context: String,
    target: &'static str,
}

/// Draws the examples: the same number of each sentiment, in random order, no sentence twice.
pub(crate) fn data_set(draw: &mut Draw) -> DataSet {
    let mut seen = HashSet::new();
    let mut rows = |count: usize, draw: &mut Draw| {
        let mut rows = Vec::with_capacity(count);
        while rows.len() < count {
            let sentiment = Sentiment::ALL[rows.len() % Sentiment::ALL.len()];
            let news = news(sentiment, draw);
            if seen.insert(news.text.clone()) {
                rows.push(Row {
                    context: sentiment_prompt(&news.text),
                    target: sentiment.label(),
                });
            }
        }
        draw.shuffle(&mut rows);
        lines(&rows)
    };
    let (train, validation) = (rows(TRAIN_ROWS, draw), rows(VALIDATION_ROWS, draw));
    DataSet {
        train,
        validation,
        sentences: seen,
    }
}

fn lines(rows: &[Row]) -> String {
    let line = |row| serde_json::to_string(row).expect("two strings are JSON") + "\n";
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_balanced_and_validation_sentences_are_new() {
        let data = data_set(&mut Draw::new(1));
        let rows = |text: &str| -> Vec<serde_json::Value> {
            text.lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect()
        };
        let (train, validation) = (rows(&data.train), rows(&data.validation));
        assert_eq!(
            [train.len(), validation.len()],
            [TRAIN_ROWS, VALIDATION_ROWS]
        );
        for rows in [&train, &validation] {
            for label in Sentiment::ALL.map(Sentiment::label) {
                let count = rows.iter().filter(|row| row["target"] == label).count();
                assert_eq!(count, rows.len() / 3, "{label}");
            }
        }
        let contexts: HashSet<_> = train
            .iter()
            .map(|row| row["context"].as_str().unwrap())
            .collect();
        assert!(
            validation
                .iter()
                .all(|row| !contexts.contains(row["context"].as_str().unwrap()))
        );
        assert!(data.train.len() + data.validation.len() < 500_000);
    }
}

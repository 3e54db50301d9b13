//! Columns of a format that have another name in a file.

use serde_json::{Map, Value};

/// The names that a file has for the columns of a format: the config key `dataset_columns`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Columns(
    /// The name in the format, and the name in the file.
    pub Vec<(String, String)>,
);

impl Columns {
    /// The name in the format of a column of the file. `None` for a column that has the name of a renamed one.
    pub(super) fn ours<'a>(&'a self, theirs: &'a str) -> Option<&'a str> {
        let named = self.0.iter().find(|(_, other)| other == theirs);
        match named {
            Some((ours, _)) => Some(ours),
            None if self.0.iter().any(|(ours, _)| ours == theirs) => None,
            None => Some(theirs),
        }
    }

    /// A row under the format's names.
    pub(super) fn renamed(&self, row: Map<String, Value>) -> Map<String, Value> {
        if self.0.is_empty() {
            return row;
        }
        let entries = row.into_iter();
        let renamed = entries.filter_map(|(key, value)| {
            let key = self.ours(&key)?.to_string();
            Some((key, value))
        });
        renamed.collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_column_is_read_under_the_files_name_and_its_namesake_is_not() {
        let columns = Columns(vec![
            ("instruction".into(), "question".into()),
            ("input".into(), "passage".into()),
        ]);
        let Value::Object(row) =
            json!({"question": "q", "instruction": "other", "input": "x", "output": "o"})
        else {
            panic!()
        };
        let renamed = Value::Object(columns.renamed(row));
        assert_eq!(renamed, json!({"instruction": "q", "output": "o"}));
    }
}

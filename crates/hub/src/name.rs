//! `ORG/NAME` and `ORG/NAME@REVISION`.

use std::fmt;

/// A repository on the Hub, perhaps at a revision: a branch, a tag, `refs/pr/N` or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `ORG/NAME`.
    pub repository: String,
    /// The text behind the `@`.
    pub revision: Option<String>,
}

/// Names that start with one of these are paths of folders, not organizations of the Hub: `models/SmolLM2` is a folder
/// that is missing.
const FOLDERS: [&str; 8] = [
    "models",
    "model",
    "runs",
    "adapters",
    "adapter",
    "checkpoints",
    "output",
    "outputs",
];

/// The Hub's limit for `ORG/NAME`.
const LONGEST_NAME: usize = 96;
const LONGEST_REVISION: usize = 200;

impl HubName {
    /// Parses a name. Only the Hub knows whether such a repository exists.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = repository.split_once('/')?;
        let valid = repository.len() <= LONGEST_NAME
            && is_part(owner)
            && is_part(name)
            && !FOLDERS.contains(&owner)
            && revision.is_none_or(is_revision);
        valid.then(|| Self {
            repository: repository.into(),
            revision: revision.map(String::from),
        })
    }

    /// The revision, by default `main`.
    pub fn revision_or_main(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// The Hub's rule for either part of a name.
fn is_part(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    part.chars().all(plain)
        && edge(part.chars().next())
        && edge(part.chars().next_back())
        && !part.contains("--")
        && !part.contains("..")
}

/// Git's rules for references, without characters that are not safe in a path.
fn is_revision(revision: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    revision.len() <= LONGEST_REVISION
        && revision.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && !part.contains("..")
                && part.chars().all(plain)
        })
}

/// Whether a text is the full hash of a commit, which always means the same files.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_an_owner_and_perhaps_a_revision() {
        let plain = HubName::parse("HuggingFaceTB/SmolLM2-135M-Instruct").unwrap();
        assert_eq!(plain.revision_or_main(), "main");
        assert_eq!(plain.to_string(), "HuggingFaceTB/SmolLM2-135M-Instruct");
        for revision in [
            "v1.0",
            "refs/pr/3",
            "0123456789abcdef0123456789abcdef01234567",
        ] {
            let text = format!("owner/model_1.5@{revision}");
            let name = HubName::parse(&text).unwrap();
            assert_eq!(name.repository, "owner/model_1.5");
            assert_eq!(name.revision_or_main(), revision);
            assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn a_path_is_no_name() {
        let long = format!("owner/{}", "x".repeat(100));
        for text in [
            "",
            "model",
            "models/SmolLM2",
            "runs/embedded",
            "../model",
            "./model",
            "/owner/model",
            "owner/model/more",
            "owner/",
            "/model",
            "owner/..",
            "owner/a..b",
            "owner/a--b",
            "owner/-a",
            "owner/a.",
            "own er/model",
            "owner/model?x",
            "owner\\model/x",
            "owner/model@",
            "owner/model@../x",
            "owner/model@a//b",
            "owner/model@.git",
            "owner/model@a b",
            "owner/modèle",
            &long,
        ] {
            assert_eq!(HubName::parse(text), None, "{text:?}");
        }
    }
}

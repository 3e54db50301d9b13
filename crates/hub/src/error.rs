//! What can go wrong between a name and a folder.

use std::io;
use std::path::PathBuf;

use super::HubName;
use terminal::human;

/// Why a name does not lead to a folder with a model or an adapter. Messages say what to do.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The text is not a folder and cannot be a name.
    #[error(
        "{text:?} is neither a folder (looked at {}) nor a name on the Hub, which has the form ORG/NAME or \
         ORG/NAME@REVISION. Name a folder in Hugging Face's layout, or a repository such as {example}",
        looked_at.display()
    )]
    Neither {
        /// What was given.
        text: String,
        /// The path that it would be.
        looked_at: PathBuf,
        /// A name that would do.
        example: &'static str,
    },
    /// A variable of the environment has a value that cannot be used.
    #[error("the environment variable {variable} cannot be used: {reason}")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Offline mode, and the cache does not have the repository.
    #[error(
        "{name} is not complete in the local cache ({missing}), and HF_HUB_OFFLINE forbids downloads. Unset \
         HF_HUB_OFFLINE; or on a machine with a connection: hf download {} --local-dir FOLDER, and name FOLDER \
         here",
        name.repository
    )]
    Offline {
        /// The repository.
        name: HubName,
        /// What the cache lacks, and where it is.
        missing: String,
    },
    /// No useful response after several attempts.
    #[error(
        "{name} cannot be downloaded from {endpoint}: {reason}. The part that was downloaded is kept; the same command \
         resumes from there. Without a connection: on another machine hf download {} --local-dir FOLDER, copy \
         FOLDER, and name it here. HF_ENDPOINT chooses a mirror, HTTPS_PROXY a proxy",
        name.repository
    )]
    NoConnection {
        /// The repository.
        name: HubName,
        /// Where the Hub should be.
        endpoint: String,
        /// The last failure.
        reason: String,
    },
    /// The Hub has no such repository, or does not show it to this user.
    #[error(
        "{name} is neither a folder here nor a repository that exists on {endpoint} and is visible {who}. Check the \
         spelling; a private repository needs a token with read access: run hf auth login, or set HF_TOKEN"
    )]
    NotFound {
        /// The repository.
        name: HubName,
        /// The Hub's address.
        endpoint: String,
        /// With or without a token.
        who: &'static str,
    },
    /// The repository has no such revision.
    #[error("{} has no revision {:?}; expected a branch, a tag or a full commit hash", name.repository, name.revision_or_main())]
    NoRevision {
        /// The repository and what was asked for.
        name: HubName,
    },
    /// The authors ask users to accept their terms first.
    #[error(
        "{name} is gated: its authors ask you to accept their terms. 1. Open {endpoint}/{} in a browser, log in and \
         accept (some authors answer after hours). 2. Create a token with read access at {endpoint}/settings/tokens. \
         3. Run hf auth login, or set HF_TOKEN, and start again. {detail}",
        name.repository
    )]
    Gated {
        /// The repository.
        name: HubName,
        /// The Hub's address.
        endpoint: String,
        /// Whether a token was sent, and the message of the Hub.
        detail: String,
    },
    /// The token is wrong or may not do this.
    #[error(
        "{endpoint} does not accept the token for {name} ({status}{said}). Create a token with read access at \
         {endpoint}/settings/tokens, then run hf auth login, or set HF_TOKEN"
    )]
    Token {
        /// The repository.
        name: HubName,
        /// The Hub's address.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// The Hub's own words, if any.
        said: String,
    },
    /// A response that is not of the Hub's protocol.
    #[error(
        "the response of {url} is not that of the Hub: {reason}. Check HF_ENDPOINT and any proxy"
    )]
    Protocol {
        /// The address.
        url: String,
        /// What was wrong.
        reason: String,
    },
    /// The weights exist only in a format that runs code when it is read.
    #[error(
        "{name} has its weights as Python pickles only ({files}), which can run any code when they are loaded and \
         are not read here. Use a repository with *.safetensors, or convert it with transformers in an isolated \
         environment: AutoModelForCausalLM.from_pretrained(\"{}\").save_pretrained(\"FOLDER\")",
        name.repository
    )]
    PickleOnly {
        /// The repository.
        name: HubName,
        /// The pickle files.
        files: String,
    },
    /// A file that is needed is not in the repository.
    #[error("{name} has no {file}{hint}")]
    MissingFile {
        /// The repository.
        name: HubName,
        /// The file, or files of which one is needed.
        file: String,
        /// What the repository is instead.
        hint: String,
    },
    /// The index of a model in several files.
    #[error("{name}: model.safetensors.index.json: {reason}")]
    Index {
        /// The repository.
        name: HubName,
        /// What is wrong with it.
        reason: String,
    },
    /// The bytes are not those that the Hub announced.
    #[error(
        "{file} of {name} has {got}, expected {expected}, after two downloads; the file was deleted. A proxy, a mirror \
         (HF_ENDPOINT) or a failing disk may corrupt it; try another connection"
    )]
    Damaged {
        /// The repository.
        name: HubName,
        /// The file.
        file: String,
        /// The hash or size that the Hub states.
        expected: String,
        /// The hash or size of the download.
        got: String,
    },
    /// Not enough disk space.
    #[error(
        "{name} needs {} more in {}, which has {} free. Free some, or let HF_HOME name a folder on a larger disk",
        human::bytes(*needed), folder.display(), human::bytes(*free)
    )]
    NoSpace {
        /// The repository.
        name: HubName,
        /// The cache.
        folder: PathBuf,
        /// Bytes still to be downloaded.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The cache cannot be read or written.
    #[error("cannot {action} {}: {source}. HF_HOME chooses another folder for downloads", path.display())]
    Cache {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

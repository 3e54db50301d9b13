//! The environment variables of `huggingface_hub`, with the same meaning.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::HubError;

/// The address of the Hub, the user's token, and the folder for downloads.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// `HF_ENDPOINT`, `https://huggingface.co` without it. No slash at the end.
    pub endpoint: String,
    /// `HF_TOKEN`, else what `hf auth login` left in `HF_TOKEN_PATH` or `HF_HOME/token`.
    pub token: Option<String>,
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`: no connection is made.
    pub offline: bool,
    /// Time-out for a response of the Hub: `HF_HUB_DOWNLOAD_TIMEOUT` in seconds, 10 without it.
    pub timeout: Duration,
    /// How often an attempt without progress is repeated, and the wait before the first repetition.
    pub retries: (usize, Duration),
}

/// A token is a secret and stays out of logs.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

const ENDPOINT: &str = "https://huggingface.co";

/// A longer file is not a token.
const LONGEST_TOKEN: u64 = 4096;

impl Settings {
    /// The settings of this process's environment.
    ///
    /// # Errors
    ///
    /// [`HubError::Setting`] names a variable whose value cannot be used.
    pub fn from_env() -> Result<Self, HubError> {
        Self::read(|name| std::env::var_os(name), std::env::home_dir())
    }

    fn read(
        variable: impl Fn(&str) -> Option<OsString>,
        home: Option<PathBuf>,
    ) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(PathBuf::from);
        let text = |name: &'static str| match set(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text.trim().to_string()).filter(|text| !text.is_empty())),
            Some(Err(_)) => Err(HubError::Setting {
                variable: name,
                reason: "it is not text".into(),
            }),
        };
        let hf_home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| home.map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| hf_home.as_ref().map(|home| home.join("hub")))
            .ok_or_else(|| HubError::Setting {
                variable: "HF_HOME",
                reason: "there is no home folder, so it must name the folder for downloads".into(),
            })?;
        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.into());
        let endpoint = endpoint.trim_end_matches('/').to_string();
        if !is_endpoint(&endpoint) {
            return Err(HubError::Setting {
                variable: "HF_ENDPOINT",
                reason: format!("it is {endpoint:?}; expected an address such as {ENDPOINT}"),
            });
        }
        let token = match text("HF_TOKEN")?.or(text("HUGGING_FACE_HUB_TOKEN")?) {
            Some(token) => Some(("HF_TOKEN", token)),
            None => path("HF_TOKEN_PATH")
                .or_else(|| hf_home.map(|home| home.join("token")))
                .and_then(token_file)
                .map(|token| ("HF_TOKEN_PATH", token)),
        };
        // It becomes part of a header.
        if let Some((variable, _)) = token
            .as_ref()
            .filter(|(_, token)| !token.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err(HubError::Setting {
                variable,
                reason: "the token contains invalid characters".into(),
            });
        }
        let timeout = match text("HF_HUB_DOWNLOAD_TIMEOUT")? {
            None => 10,
            Some(seconds) => match seconds.parse() {
                Ok(seconds @ 1..=3600) => seconds,
                _ => {
                    return Err(HubError::Setting {
                        variable: "HF_HUB_DOWNLOAD_TIMEOUT",
                        reason: format!("it is {seconds:?}; expected seconds from 1 to 3600"),
                    });
                }
            },
        };
        let on = |name| text(name).map(|word| word.as_deref().is_some_and(is_true));
        Ok(Self {
            endpoint,
            token: token.map(|(_, token)| token),
            cache,
            offline: on("HF_HUB_OFFLINE")? || on("TRANSFORMERS_OFFLINE")?,
            timeout: Duration::from_secs(timeout),
            retries: (5, Duration::from_secs(1)),
        })
    }
}

/// The values that `huggingface_hub` reads as true.
fn is_true(word: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&word.to_ascii_uppercase().as_str())
}

fn is_endpoint(text: &str) -> bool {
    let rest = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'))
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"?#\"<>".contains(&byte))
}

fn token_file(path: PathBuf) -> Option<String> {
    let length = std::fs::metadata(&path).ok()?.len();
    let text = (length <= LONGEST_TOKEN).then(|| std::fs::read_to_string(&path).ok())??;
    Some(text.trim().to_string()).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Settings::read(variable, Some("/home/someone".into()))
    }

    #[test]
    fn without_variables_it_is_hugging_face_and_the_standard_cache() {
        let settings = read(&[]).unwrap();
        assert_eq!(settings.endpoint, "https://huggingface.co");
        assert_eq!(
            settings.cache,
            PathBuf::from("/home/someone/.cache/huggingface/hub")
        );
        assert_eq!((settings.token, settings.offline), (None, false));
        assert_eq!(settings.timeout, Duration::from_secs(10));
    }

    #[test]
    fn the_cache_is_where_the_variables_say() {
        let cache = |variables: &[(&str, &str)]| read(variables).unwrap().cache;
        assert_eq!(
            cache(&[("HF_HOME", "/data/hf")]),
            PathBuf::from("/data/hf/hub")
        );
        let both = [("HF_HOME", "/data/hf"), ("HF_HUB_CACHE", "/other")];
        assert_eq!(cache(&both), PathBuf::from("/other"));
        assert_eq!(
            cache(&[("XDG_CACHE_HOME", "/c"), ("HF_HOME", "")]),
            PathBuf::from("/c/huggingface/hub")
        );
    }

    #[test]
    fn the_token_is_the_variable_else_the_file_of_the_login() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().to_str().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let token = |variables: &[(&str, &str)]| read(variables).unwrap().token;
        assert_eq!(token(&[("HF_HOME", folder)]).as_deref(), Some("hf_file"));
        let both = [("HF_HOME", folder), ("HF_TOKEN", " hf_variable ")];
        assert_eq!(token(&both).as_deref(), Some("hf_variable"));
        std::fs::write(home.path().join("token"), vec![b'x'; 5000]).unwrap();
        assert_eq!(token(&[("HF_HOME", folder)]), None);
        let settings = read(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn offline_has_several_words() {
        for (word, offline) in [
            ("1", true),
            ("true", true),
            ("YES", true),
            ("0", false),
            ("", false),
        ] {
            assert_eq!(
                read(&[("HF_HUB_OFFLINE", word)]).unwrap().offline,
                offline,
                "{word}"
            );
        }
        assert!(read(&[("TRANSFORMERS_OFFLINE", "on")]).unwrap().offline);
    }

    #[test]
    fn a_value_that_cannot_be_used_is_named() {
        for (variable, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_ENDPOINT", "https://"),
            ("HF_ENDPOINT", "https://a b"),
            ("HF_ENDPOINT", "file:///etc"),
            ("HF_TOKEN", "hf_\r\nX-Header: 1"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
        ] {
            let error = read(&[(variable, value)]).unwrap_err().to_string();
            assert!(error.contains(variable), "{variable}={value:?}: {error}");
        }
        let mirror = read(&[("HF_ENDPOINT", "https://hf.example/")]).unwrap();
        assert_eq!(mirror.endpoint, "https://hf.example");
    }
}

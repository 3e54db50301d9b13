//! Requests to the Hub and to the servers of large files to which it redirects.
//!
//! They go through `hf-hub`'s client (addresses, token, TLS). Version 0.5 of that crate sets no time limits,
//! follows relative redirects without limit, and appends to a partial file whether or not the server resumed, so
//! redirects, ranges and failures are handled here.

use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Body, RequestBuilder};

use super::digest::Digest;
use super::listing::Listing;
use super::{HubError, HubName, Settings};

/// The longest list of files that is read, in bytes.
const LARGEST_ANSWER: u64 = 32 << 20;
const MOST_REDIRECTS: usize = 8;
/// The longest wait that a server can ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another attempt may help, after this time if the server sets one.
    Passing(String, Option<Duration>),
    /// Another attempt does not help.
    Final(HubError),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

/// A response, and what the Hub stated about the file before it redirected.
pub(super) struct Answer {
    pub url: String,
    pub response: Response<Body>,
    /// `X-Linked-Etag`, else `ETag`.
    pub digest: Option<Digest>,
    /// `X-Linked-Size`.
    pub size: Option<u64>,
}

/// One repository of the Hub.
pub(super) struct Client<'a> {
    settings: &'a Settings,
    name: &'a HubName,
    repository: ApiRepo,
}

impl<'a> Client<'a> {
    pub fn new(settings: &'a Settings, name: &'a HubName) -> Result<Self, HubError> {
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_user_agent("llama-lora-trainer", env!("CARGO_PKG_VERSION"))
            .with_progress(false)
            .build()
            .map_err(|error| HubError::Protocol {
                url: settings.endpoint.clone(),
                reason: error.to_string(),
            })?;
        Ok(Self {
            settings,
            name,
            repository: api.repo(repo(name)),
        })
    }

    /// The repository's commit and files.
    pub fn listing(&self) -> Result<Listing, Failure> {
        let request = self.repository.info_request().query("blobs", "true");
        let url = request.uri_ref().map(Uri::to_string).unwrap_or_default();
        let mut answer = self.get(&url, None)?;
        let status = answer.response.status().as_u16();
        if status != 200 {
            return Err(self.refused(&answer.url, status, answer.response.headers()));
        }
        let body = answer
            .response
            .body_mut()
            .with_config()
            .limit(LARGEST_ANSWER);
        let bytes = body.read_to_vec().map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => {
                self.not_the_protocol(&url, "its list of files is too long".into())
            }
            error => Failure::Passing(error.to_string(), None),
        })?;
        Listing::parse(&bytes).map_err(|reason| self.not_the_protocol(&url, reason))
    }

    /// The address of a file at a commit.
    pub fn file_url(&self, commit: &str, file: &str) -> String {
        // hf-hub's `url` has the requested revision, which may move to another commit during the download.
        format!(
            "{}/{}/resolve/{commit}/{file}",
            self.settings.endpoint, self.name.repository
        )
    }

    /// Requests a file from byte `from` on. Any status but a redirect is returned.
    pub fn get(&self, url: &str, from: Option<u64>) -> Result<Answer, Failure> {
        let mut url = url.to_string();
        let (mut digest, mut size) = (None, None);
        for _ in 0..=MOST_REDIRECTS {
            let response = self.request(&url, from).call();
            let response = response.map_err(|error| self.no_answer(&url, &error))?;
            let headers = response.headers();
            if self.is_at_the_hub(&url) {
                let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
                digest = digest.or_else(|| etag.and_then(Digest::parse));
                size = size.or_else(|| text(headers, "x-linked-size")?.parse().ok());
            }
            // 304 (not modified) is not a redirect.
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer {
                    url,
                    response,
                    digest,
                    size,
                });
            }
            let location = text(headers, "location").unwrap_or_default();
            url =
                redirected(&url, location).map_err(|reason| self.not_the_protocol(&url, reason))?;
        }
        Err(self.not_the_protocol(&url, format!("more than {MOST_REDIRECTS} redirects")))
    }

    fn request(
        &self,
        url: &str,
        from: Option<u64>,
    ) -> RequestBuilder<ureq::typestate::WithoutBody> {
        let mut request = self.repository.info_request().uri(url);
        // The token is for the Hub alone, not for the servers to which it redirects.
        if !self.is_at_the_hub(url)
            && let Some(headers) = request.headers_mut()
        {
            headers.remove("authorization");
        }
        // Sizes, ranges and hashes are of the bytes as they are stored.
        request = request.header("accept-encoding", "identity");
        if let Some(from) = from {
            request = request.header("range", format!("bytes={from}-"));
        }
        let timeout = Some(self.settings.timeout);
        request
            .config()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(timeout)
            .timeout_connect(timeout)
            .timeout_send_request(timeout)
            .timeout_recv_response(timeout)
            .timeout_per_read(timeout)
            .build()
    }

    fn is_at_the_hub(&self, url: &str) -> bool {
        let origin = |url: &str| {
            let uri: Uri = url.parse().ok()?;
            Some((
                uri.scheme_str()?.to_owned(),
                uri.authority()?.as_str().to_lowercase(),
            ))
        };
        let origin_of_hub = origin(&self.settings.endpoint);
        origin_of_hub.is_some() && origin(url) == origin_of_hub
    }

    /// What a status other than success means. The Hub gives details in its headers.
    pub fn refused(&self, url: &str, status: u16, headers: &HeaderMap) -> Failure {
        let endpoint = self.settings.endpoint.clone();
        let name = self.name.clone();
        let said = words(text(headers, "x-error-message").unwrap_or_default());
        let has_token = self.settings.token.is_some();
        if matches!(status, 408 | 425 | 429 | 500..=599) {
            let wait = text(headers, "retry-after").and_then(|seconds| seconds.parse().ok());
            let wait = wait.map(|seconds| Duration::from_secs(seconds).min(LONGEST_WAIT));
            return Failure::Passing(
                format!("{} answers with status {status}{said}", host(url)),
                wait,
            );
        }
        if !self.is_at_the_hub(url) {
            // Signed addresses of large files expire; the Hub gives a new one.
            return match status {
                400 | 401 | 403 | 404 | 410 => {
                    Failure::Passing(format!("{} answers with status {status}", host(url)), None)
                }
                _ => self.not_the_protocol(url, format!("status {status}{said}")),
            };
        }
        match (status, text(headers, "x-error-code").unwrap_or_default()) {
            (401 | 403, "GatedRepo") => HubError::Gated {
                name,
                endpoint,
                detail: if has_token {
                    format!("The token that was sent does not open it{said}")
                } else {
                    format!("No token was sent{said}")
                },
            },
            (404, "RevisionNotFound") => HubError::NoRevision { name },
            (404, "EntryNotFound") => HubError::MissingFile {
                name,
                file: words(url.rsplit('/').next().unwrap_or_default())
                    .trim_start_matches(": ")
                    .into(),
                hint: ", although it is listed".into(),
            },
            // Without a token, the Hub does not distinguish private repositories from those that do not exist.
            (401, "RepoNotFound") | (404, _) => HubError::NotFound {
                name,
                endpoint,
                who: if has_token {
                    "to the token that was sent"
                } else {
                    "without a token"
                },
            },
            (401, _) if !has_token => HubError::NotFound {
                name,
                endpoint,
                who: "without a token",
            },
            (401 | 403, _) => HubError::Token {
                name,
                endpoint,
                status,
                said,
            },
            _ => return self.not_the_protocol(url, format!("status {status}{said}")),
        }
        .into()
    }

    /// A request without a response.
    fn no_answer(&self, url: &str, error: &ureq::Error) -> Failure {
        match error {
            ureq::Error::Http(_) | ureq::Error::BadUri(_) | ureq::Error::Protocol(_) => {
                self.not_the_protocol(url, error.to_string())
            }
            error => Failure::Passing(format!("{}: {error}", host(url)), None),
        }
    }

    pub fn not_the_protocol(&self, url: &str, reason: String) -> Failure {
        Failure::Final(HubError::Protocol {
            url: words(url.split('?').next().unwrap_or_default())
                .trim_start_matches(": ")
                .into(),
            reason,
        })
    }
}

/// hf-hub's form of a name.
pub(super) fn repo(name: &HubName) -> Repo {
    Repo::with_revision(
        name.repository.clone(),
        RepoType::Model,
        name.revision_or_main().into(),
    )
}

pub(super) fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// The message of a server as part of our own: `: …`, without control characters, shortened.
fn words(said: &str) -> String {
    let plain: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
    match plain.trim() {
        "" => String::new(),
        said => format!(": {said}"),
    }
}

fn host(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    let host = uri
        .as_ref()
        .and_then(Uri::authority)
        .map(|authority| authority.to_string());
    host.unwrap_or_else(|| "the Hub".into())
}

/// The address that a redirect leads to.
fn redirected(from: &str, location: &str) -> Result<String, String> {
    let Some((scheme, rest)) = from.split_once("://") else {
        return Err("a redirect from no address".into());
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let to = match location {
        "" => return Err("a redirect to nowhere".into()),
        _ if location.starts_with("https://") || location.starts_with("http://") => location.into(),
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ => return Err("a redirect to no address of the web".into()),
    };
    if scheme == "https" && !to.starts_with("https://") {
        Err("a redirect from a protected connection to an open one".into())
    } else {
        Ok(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_to_addresses_and_never_to_open_connections() {
        let from = "https://hub.example:8443/a/b?c";
        let to = |location| redirected(from, location);
        assert_eq!(
            to("https://cdn.example/x").unwrap(),
            "https://cdn.example/x"
        );
        assert_eq!(to("//cdn.example/x").unwrap(), "https://cdn.example/x");
        assert_eq!(to("/x?y").unwrap(), "https://hub.example:8443/x?y");
        for location in ["", "x", "file:///etc/passwd", "http://cdn.example/x"] {
            assert!(to(location).is_err(), "{location}");
        }
        assert!(redirected("http://a/b", "http://c/d").is_ok());
    }

    #[test]
    fn a_servers_words_are_short_and_plain() {
        assert_eq!(
            words(" Access\r\n\u{1b}[31m denied "),
            ": Access[31m denied"
        );
        assert_eq!(words(""), "");
        assert!(words(&"x".repeat(10_000)).len() < 210);
    }
}

//! The model hub over HTTP: what a repository holds, and the files in it.
//!
//! Redirects are followed here and not by the HTTP library, because the access token is for the hub's own host alone: the
//! hub sends large files on to other hosts, which have no business with it.

use crate::error::Error;
use serde::Deserialize;
use std::fmt;
use std::io::{self, Read};
use std::time::Duration;
use ureq::http::{Response, StatusCode, Uri, header};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

const ENDPOINT: &str = "https://huggingface.co";
/// Redirects of one request.
const REDIRECTS: usize = 10;
/// The worker's reader gives a silent server up earlier; this ends its thread.
const GRACE: Duration = Duration::from_secs(5);

/// What failed while a file was fetched.
#[derive(Debug)]
pub enum Failure {
    /// The server refused, or the network failed.
    Http(Box<ureq::Error>),
    /// The server's answer makes no sense.
    Answer(String),
    /// The connection ended early or stood still.
    Broken(io::Error),
    /// The cache cannot be written.
    Disk(io::Error),
    /// Whoever watches wants no more.
    Stopped(Error),
}

impl Failure {
    /// The HTTP status with which the server refused.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Http(e) => match **e {
                ureq::Error::StatusCode(status) => Some(status),
                _ => None,
            },
            _ => None,
        }
    }
}

impl From<ureq::Error> for Failure {
    fn from(e: ureq::Error) -> Self {
        Self::Http(Box::new(e))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(e) => e.fmt(f),
            Self::Answer(what) => what.fmt(f),
            Self::Broken(e) | Self::Disk(e) => e.fmt(f),
            Self::Stopped(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

/// What the hub tells about a repository, as far as it matters here.
#[derive(Deserialize)]
pub struct Info {
    /// The commit that the revision is now.
    pub sha: String,
    siblings: Vec<Sibling>,
    #[serde(rename = "cardData", default)]
    card: Option<Card>,
}

impl Info {
    /// Paths of the files.
    pub fn files(&self) -> Vec<String> {
        self.siblings.iter().map(|file| file.rfilename.clone()).collect()
    }

    /// The licence that the repository's README names.
    pub fn licence(&self) -> Option<String> {
        self.card.as_ref()?.license.as_str().map(str::to_owned)
    }
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The head of the repository's README. Authors write it by hand, so nothing in it is certain to be there.
#[derive(Deserialize)]
struct Card {
    #[serde(default)]
    license: serde_json::Value,
}

/// What the hub tells about a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Facts {
    /// A name for its content: SHA-256 of a large file, git's hash of a small one.
    pub etag: String,
    /// Its size, where the hub says it.
    pub size: Option<u64>,
}

/// A connection to a hub.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Client {
    /// The hub at `endpoint`, or the usual one; `token` opens what is not for everybody. A server that is silent for
    /// `patience` is given up.
    pub fn new(endpoint: Option<&str>, token: Option<String>, patience: Duration) -> Self {
        let patience = Some(patience + GRACE);
        let config = Agent::config_builder()
            .max_redirects(0)
            .user_agent(concat!("pocketlora/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges are of the file's own bytes.
            .accept_encoding("identity")
            .timeout_connect(patience)
            .timeout_recv_response(patience)
            .timeout_per_read(patience);
        let endpoint = endpoint.unwrap_or(ENDPOINT).trim_end_matches('/').to_owned();
        Self { agent: config.build().into(), endpoint, token }
    }

    /// What the repository `repo` holds at `revision`.
    pub fn info(&self, repo: &str, revision: &str) -> Result<Info, Failure> {
        let url = format!("{}/api/models/{repo}/revision/{}", self.endpoint, revision.replace('/', "%2F"));
        let mut response = self.follow(&url, |agent, url| agent.get(url), |_, _| true)?;
        Ok(response.body_mut().read_json()?)
    }

    /// The address of a file of `repo` at `commit`.
    pub fn address(&self, repo: &str, commit: &str, name: &str) -> String {
        format!("{}/{repo}/resolve/{commit}/{name}", self.endpoint)
    }

    /// What the hub tells about the file at `url`. Only the hub is asked: where it sends readers on to another host, it says
    /// itself what they will get.
    pub fn facts(&self, url: &str) -> Result<Facts, Failure> {
        let linked = |response: &Response<Body>| response.headers().contains_key("x-linked-etag");
        let response =
            self.follow(url, |agent, url| agent.head(url), |next, response| self.is_hub(next) && !linked(response))?;
        facts_in(&response)
    }

    /// The bytes of the file at `url` from `from` on, or from where the server has them: all of them, if it knows no ranges.
    pub fn bytes(&self, url: &str, from: u64) -> Result<(u64, impl Read + use<>), Failure> {
        let range = format!("bytes={from}-");
        let ask = |agent: &Agent, url: &str| agent.get(url).header(header::RANGE, &range);
        let response = self.follow(url, ask, |_, _| true)?;
        let begin = if response.status() == StatusCode::PARTIAL_CONTENT { from } else { 0 };
        Ok((begin, response.into_body().into_reader()))
    }

    /// Sends what `ask` makes, and again to where it is sent on to, as long as `goes` agrees. The token goes to the hub alone.
    fn follow(
        &self,
        url: &str,
        ask: impl Fn(&Agent, &str) -> RequestBuilder<WithoutBody>,
        goes: impl Fn(&str, &Response<Body>) -> bool,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS {
            let mut request = ask(&self.agent, &url);
            if let Some(token) = self.token.as_ref().filter(|_| self.is_hub(&url)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call()?;
            match target(&url, &response)? {
                Some(next) if goes(&next, &response) => url = next,
                _ => return Ok(response),
            }
        }
        Err(Failure::Answer(format!("it was sent on more than {REDIRECTS} times")))
    }

    /// Whether `url` is of the hub itself: the same scheme, host and port.
    fn is_hub(&self, url: &str) -> bool {
        match (origin(url), origin(&self.endpoint)) {
            (Some(a), Some(b)) => a == b,
            _ => false,
        }
    }
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> Option<(String, String, Option<u16>)> {
    let uri: Uri = url.parse().ok()?;
    Some((uri.scheme_str()?.to_owned(), uri.host()?.to_ascii_lowercase(), uri.port_u16()))
}

/// Where `response` from `url` sends its reader on to.
fn target(url: &str, response: &Response<Body>) -> Result<Option<String>, Failure> {
    if !response.status().is_redirection() {
        return Ok(None);
    }
    let place = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let whole = |place: &str| {
        if place.starts_with("http://") || place.starts_with("https://") {
            return Some(place.to_owned());
        }
        let uri: Uri = url.parse().ok()?;
        let (scheme, host) = (uri.scheme_str()?, uri.authority()?);
        match place.strip_prefix("//") {
            Some(_) => Some(format!("{scheme}:{place}")),
            None => place.starts_with('/').then(|| format!("{scheme}://{host}{place}")),
        }
    };
    match place.and_then(whole) {
        Some(next) => Ok(Some(next)),
        None => Err(Failure::Answer("the server sends it on without saying where to".to_owned())),
    }
}

/// What the headers of `response` say about a file.
fn facts_in(response: &Response<Body>) -> Result<Facts, Failure> {
    let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    let first = |names: [&str; 2]| names.into_iter().find_map(text);
    let etag = first(["x-linked-etag", "etag"]).unwrap_or_default();
    // It becomes the name of a file.
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    if !super::name::is_plain(etag) {
        return Err(Failure::Answer(format!("expected a header `ETag` that can be the name of a file, got `{etag}`")));
    }
    let own = !response.status().is_redirection();
    let size = text("x-linked-size").or_else(|| text("content-length").filter(|_| own));
    Ok(Facts { etag: etag.to_owned(), size: size.and_then(|size| size.parse().ok()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_for_the_hub_alone() {
        let client = |endpoint| Client::new(Some(endpoint), None, Duration::from_secs(1));
        let hub = client("https://hub.example/");
        for (url, own) in [
            ("https://hub.example/a", true),
            ("https://HUB.example/a", true),
            ("http://hub.example/a", false),
            ("https://hub.example:444/a", false),
            ("https://hub.example.evil/a", false),
            ("https://hub.example@evil/a", false),
            ("https://evil/https://hub.example/", false),
            ("//hub.example/a", false),
        ] {
            assert_eq!(hub.is_hub(url), own, "{url}");
        }
        assert!(client("http://127.0.0.1:80").is_hub("http://127.0.0.1:80/x"));
        assert!(!client("http://127.0.0.1:80").is_hub("http://127.0.0.1:81/x"));
    }

    #[test]
    fn a_reader_is_sent_on_by_whole_and_by_short_addresses() {
        let response = |place: Option<&str>| {
            let mut builder = Response::builder().status(302);
            if let Some(place) = place {
                builder = builder.header("Location", place);
            }
            builder.body(Body::builder().data("")).unwrap()
        };
        for (place, expected) in [
            (Some("https://b/x?y=1"), Some("https://b/x?y=1")),
            (Some("/x"), Some("https://a:1/x")),
            (Some("//b/x"), Some("https://b/x")),
            (Some("x"), None),
            (Some("file:///etc/passwd"), None),
            (None, None),
        ] {
            let found = target("https://a:1/file", &response(place));
            assert_eq!(found.ok().flatten().as_deref(), expected, "{place:?}");
        }
    }
}

//! A model hub on this machine: just enough HTTP to pull from it, with faults on request.

use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One file of the repository; `etag` is what the hub promises.
#[derive(Clone)]
pub struct Served {
    pub name: String,
    pub bytes: Vec<u8>,
    pub etag: String,
}

/// A file as the hub serves large ones: its etag is its SHA-256.
pub fn large(name: &str, bytes: Vec<u8>) -> Served {
    let etag = super::hex(&Sha256::digest(&bytes));
    Served { name: name.into(), bytes, etag }
}

/// A file as the hub serves small ones: its etag is git's.
pub fn small(name: &str, text: &str) -> Served {
    Served { name: name.into(), bytes: text.into(), etag: format!("{:040x}", text.len()) }
}

#[derive(Default)]
pub struct State {
    pub files: Vec<Served>,
    /// The commit that the hub names; empty for [`COMMIT`].
    pub commit: String,
    /// How many more bodies end in the middle.
    pub cut: usize,
    /// Bodies stop in the middle, and the connection stays open.
    pub stall: bool,
    /// Files are elsewhere: requests for them are sent on to this address, relative or of another server.
    pub elsewhere: Option<String>,
    /// Who does not come with this token gets this status.
    pub gate: Option<(String, u16)>,
    /// `path range` of every request so far.
    pub log: Vec<String>,
    /// The header `Authorization` of each of them.
    pub tokens: Vec<Option<String>>,
}

#[derive(Clone)]
pub struct Server {
    pub endpoint: String,
    pub state: Arc<Mutex<State>>,
}

/// Serves `files` as the repository `maker/model` until the test process ends.
pub fn start(files: Vec<Served>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let state = Arc::new(Mutex::new(State { files, ..State::default() }));
    let shared = state.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, state) = (stream.unwrap(), shared.clone());
            // A client that goes away is part of the tests.
            thread::spawn(move || answer(stream, &state).unwrap_or_default());
        }
    });
    Server { endpoint, state }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let only_head = request.starts_with("HEAD ");
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut token) = (None, None);
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if line.to_ascii_lowercase().starts_with("authorization: ") {
            token = Some(line["authorization: ".len()..].to_owned());
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            range = value.split_once('-').map(|(from, to)| (from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
        }
    }
    let (file, commit, cut, stall, info, refusal, elsewhere) = {
        let mut state = state.lock().unwrap();
        state.tokens.push(token.clone());
        let allowed = |(wanted, _): &(String, u16)| token.as_deref() == Some(&*format!("Bearer {wanted}"));
        let refusal = state.gate.as_ref().filter(|gate| !allowed(gate)).map(|(_, status)| *status);
        state.log.push(format!("{path} {range:?}"));
        let commit = if state.commit.is_empty() { COMMIT.into() } else { state.commit.clone() };
        let siblings: Vec<_> = state.files.iter().map(|f| serde_json::json!({ "rfilename": f.name })).collect();
        let info = serde_json::json!({ "sha": commit, "siblings": siblings, "cardData": { "license": "mit" } });
        let prefix = format!("/maker/model/resolve/{commit}/");
        let asked = path.strip_prefix("/moved").unwrap_or(&path).strip_prefix(&prefix);
        let file = state.files.iter().find(|f| asked == Some(&f.name)).cloned();
        let elsewhere = state.elsewhere.clone().filter(|_| file.is_some() && !path.starts_with("/moved"));
        // Only whole-file requests have a middle.
        let body = file.is_some() && !only_head && range.is_some_and(|(_, to)| to.is_none());
        let cut = body && state.cut > 0;
        state.cut -= usize::from(cut);
        (file, commit, cut, body && state.stall, info.to_string(), refusal, elsewhere)
    };
    if let Some(status) = refusal {
        return write!(stream, "HTTP/1.1 {status} No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    }
    if let (Some(elsewhere), Some(file)) = (elsewhere, &file) {
        // As the hub does, which names size and checksum itself.
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: {elsewhere}{path}\r\nX-Linked-Etag: \"{}\"\r\n\
             X-Linked-Size: {}\r\nX-Repo-Commit: {commit}\r\nContent-Length: 0\r\n\r\n",
            file.etag,
            file.bytes.len()
        );
    }
    if ["main", "v1%2Fx", COMMIT].iter().any(|name| path == format!("/api/models/maker/model/revision/{name}")) {
        return write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{info}", info.len());
    }
    let Some(file) = file else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    };
    let (from, to) = range.unwrap_or((0, None));
    let total = file.bytes.len();
    if only_head {
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {total}\r\nETag: \"{}\"\r\nX-Repo-Commit: {commit}\r\n\r\n",
            file.etag
        );
    }
    if from >= total {
        return write!(stream, "HTTP/1.1 416 Out Of Range\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    }
    let to = to.unwrap_or(total - 1).min(total - 1);
    let body = &file.bytes[from..=to];
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nConnection: close\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{to}/{total}\r\n\
         ETag: \"{}\"\r\nX-Repo-Commit: {commit}\r\n\r\n",
        body.len(),
        file.etag
    )?;
    if !cut && !stall {
        return stream.write_all(body);
    }
    stream.write_all(&body[..body.len() / 2])?;
    if stall {
        thread::sleep(std::time::Duration::from_secs(60));
    }
    Ok(())
}

//! A server on this machine that implements the Hugging Face Hub's protocol, and breaks it if a
//! test requests that.
//!
//! Two ports: the Hub, and the storage for large files that it redirects to. They are different
//! origins, as on the web.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit that `main` and `v1` of every repository are at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A repository and its unusual properties.
#[derive(Debug, Clone, Default)]
pub struct Repository {
    /// Names and bytes. Safetensors are in large-file storage.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Only requests with this token may read the files.
    pub gated: Option<String>,
    /// Only requests with this token may know that it exists.
    pub private: Option<String>,
    /// The list of files has neither sizes nor hashes, as with some mirrors.
    pub without_sizes: bool,
    /// Small files are behind a relative redirect, as on the Hub.
    pub small_files_redirect: bool,
    /// The list of files is replaced by this.
    pub listing: Option<String>,
    /// Headers of a file that are overridden; an empty value removes one.
    pub headers: Vec<(&'static str, String)>,
    /// Sizes in the listing that replace the right ones.
    pub stated_sizes: BTreeMap<String, u64>,
}

/// A fault of one answer with a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// This status, with this `Retry-After` in seconds.
    Status(u16, Option<u64>),
    /// The connection ends after this many bytes of the body.
    CutAfter(usize),
    /// The body has other bytes of the same length.
    WrongBytes,
    /// The whole file, whatever range was requested.
    WholeFile,
    /// A range with another beginning.
    WrongRange,
    /// Nothing more is sent, and the connection stays open.
    Silence,
    /// A redirect to this address.
    Redirect(String),
    /// As many bytes as the client accepts, without a length.
    Endless,
    /// Headers without an end.
    EndlessHeaders,
    /// Something that is not HTTP.
    Garbage,
}

/// A received request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query.
    pub path: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// Whether it was sent to the storage for large files.
    pub to_storage: bool,
}

#[derive(Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    /// Faults of a file; each answer uses up one.
    faults: BTreeMap<String, VecDeque<Fault>>,
    requests: Vec<Request>,
    /// The pause before a body, so that downloads overlap.
    delay: Duration,
}

/// The server; it stops when it is dropped.
pub struct HubServer {
    hub: SocketAddr,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    threads: Vec<(SocketAddr, JoinHandle<()>)>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The SHA-256 of bytes, in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Git's hash of a blob.
pub fn git_hash(bytes: &[u8]) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex(&hasher.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Repository {
    /// A repository of these files.
    pub fn of(files: &[(&str, &[u8])]) -> Self {
        let files = files
            .iter()
            .map(|(name, bytes)| (name.to_string(), bytes.to_vec()));
        Self {
            files: files.collect(),
            ..Self::default()
        }
    }

    /// A repository of a folder's files.
    ///
    /// # Panics
    ///
    /// If the folder cannot be read.
    pub fn of_folder(folder: &std::path::Path) -> Self {
        let entries = std::fs::read_dir(folder).expect("the folder is there");
        let files = entries.map(|entry| {
            let path = entry.expect("the folder can be read").path();
            let name = path.file_name().expect("an entry has a name");
            let bytes = std::fs::read(&path).expect("the file can be read");
            (name.to_string_lossy().into_owned(), bytes)
        });
        Self {
            files: files.collect(),
            ..Self::default()
        }
    }

    fn answer(&self) -> String {
        if let Some(text) = &self.listing {
            return text.clone();
        }
        let sibling = |(name, bytes): (&String, &Vec<u8>)| -> Value {
            let size = self
                .stated_sizes
                .get(name)
                .copied()
                .unwrap_or(bytes.len() as u64);
            match (self.without_sizes, is_large(name)) {
                (true, _) => json!({"rfilename": name}),
                (false, false) => {
                    json!({"rfilename": name, "size": size, "blobId": git_hash(bytes)})
                }
                (false, true) => {
                    json!({"rfilename": name, "size": size, "blobId": git_hash(b"pointer"),
                    "lfs": {"sha256": sha256(bytes), "size": size, "pointerSize": 134}})
                }
            }
        };
        let siblings: Vec<Value> = self.files.iter().map(sibling).collect();
        json!({"sha": COMMIT, "siblings": siblings}).to_string()
    }
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin")
}

impl HubServer {
    /// Starts a server without repositories.
    ///
    /// # Panics
    ///
    /// If no loopback port is available.
    pub fn start() -> Self {
        let bind = || TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let (hub, storage) = (bind(), bind());
        let address = |listener: &TcpListener| listener.local_addr().expect("it has an address");
        let (hub_address, storage_address) = (address(&hub), address(&storage));
        let state = Arc::new(Mutex::new(State::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let serve = |listener: TcpListener, to_storage: bool| {
            let (state, stop) = (Arc::clone(&state), Arc::clone(&stop));
            let at = address(&listener);
            let thread = std::thread::spawn(move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let Ok(stream) = stream else { continue };
                    let (state, stop) = (Arc::clone(&state), Arc::clone(&stop));
                    std::thread::spawn(move || {
                        // A client that disconnected is not an error.
                        let _ = answer(stream, &state, &stop, to_storage, storage_address);
                    });
                }
            });
            (at, thread)
        };
        let threads = vec![serve(hub, false), serve(storage, true)];
        Self {
            hub: hub_address,
            state,
            stop,
            threads,
        }
    }

    /// The address for `HF_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.hub)
    }

    /// Adds or replaces a repository.
    pub fn put(&self, name: &str, repository: Repository) {
        lock(&self.state)
            .repositories
            .insert(name.into(), repository);
    }

    /// The faults of the next answers with this file.
    pub fn break_file(&self, file: &str, faults: &[Fault]) {
        let faults = faults.iter().cloned().collect();
        lock(&self.state).faults.insert(file.into(), faults);
    }

    /// The pause before each file's bytes.
    pub fn delay(&self, pause: Duration) {
        lock(&self.state).delay = pause;
    }

    /// Returns the requests so far and forgets them.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.state).requests)
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for (address, thread) in self.threads.drain(..) {
            // Wakes the thread, which waits for a connection.
            drop(TcpStream::connect(address));
            let _ = thread.join();
        }
    }
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn of(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()));
        Self {
            status,
            headers: headers.collect(),
            body: body.to_vec(),
        }
    }

    fn send(&self, stream: &mut TcpStream, cut_after: Option<usize>) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", self.status);
        head += &format!("Content-Length: {}\r\n", self.body.len());
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        let length = cut_after.unwrap_or(self.body.len()).min(self.body.len());
        stream.write_all(&self.body[..length])?;
        stream.flush()?;
        stream.shutdown(Shutdown::Write)
    }
}

fn read_request(stream: &TcpStream, to_storage: bool) -> Option<Request> {
    let mut lines = BufReader::new(stream.try_clone().ok()?.take(64 << 10)).lines();
    let first = lines.next()?.ok()?;
    let mut request = Request {
        path: first.split(' ').nth(1)?.to_string(),
        range: None,
        authorization: None,
        to_storage,
    };
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            match name.to_ascii_lowercase().as_str() {
                "range" => request.range = Some(value.trim().into()),
                "authorization" => request.authorization = Some(value.trim().into()),
                _ => {}
            }
        }
    }
    Some(request)
}

fn answer(
    mut stream: TcpStream,
    state: &Mutex<State>,
    stop: &AtomicBool,
    to_storage: bool,
    storage: SocketAddr,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let Some(request) = read_request(&stream, to_storage) else {
        return Ok(());
    };
    let path = request
        .path
        .split('?')
        .next()
        .unwrap_or_default()
        .to_string();
    let (found, delay) = {
        let mut state = lock(state);
        state.requests.push(request.clone());
        (find(&mut state, &path, &request, storage), state.delay)
    };
    let (file, bytes, headers) = match found {
        Found::Reply(reply) => return reply.send(&mut stream, None),
        Found::File(name, bytes, headers) => (name, bytes, headers),
    };
    std::thread::sleep(delay);
    let fault = lock(state)
        .faults
        .get_mut(&file)
        .and_then(VecDeque::pop_front);
    let total = bytes.len();
    let mut reply = Reply {
        status: 200,
        headers,
        body: bytes,
    };
    let from = request.range.as_deref().and_then(|range| {
        let from = range.strip_prefix("bytes=")?.split('-').next()?;
        from.parse::<usize>().ok()
    });
    if let Some(from) = from.filter(|_| fault != Some(Fault::WholeFile)) {
        if from >= total && total > 0 {
            return Reply::of(416, &[], b"").send(&mut stream, None);
        }
        reply.status = 206;
        reply.body.drain(..from);
        let first = if fault == Some(Fault::WrongRange) {
            from + 1
        } else {
            from
        };
        let range = format!("bytes {first}-{}/{total}", total.saturating_sub(1));
        reply.headers.push(("Content-Range".into(), range));
    }
    match fault {
        None | Some(Fault::WholeFile | Fault::WrongRange) => reply.send(&mut stream, None),
        Some(Fault::CutAfter(length)) => reply.send(&mut stream, Some(length)),
        Some(Fault::WrongBytes) => {
            reply.body.iter_mut().for_each(|byte| *byte ^= 1);
            reply.send(&mut stream, None)
        }
        Some(Fault::Status(status, wait)) => {
            let wait = wait.map(|seconds| seconds.to_string());
            let headers: Vec<(&str, &str)> = wait
                .iter()
                .map(|wait| ("Retry-After", wait.as_str()))
                .collect();
            Reply::of(status, &headers, b"busy").send(&mut stream, None)
        }
        Some(Fault::Redirect(to)) => {
            Reply::of(302, &[("Location", &to)], b"").send(&mut stream, None)
        }
        Some(Fault::Garbage) => stream.write_all(b"\x00\xff\x16\x03SSH-2.0-OpenSSH\r\n\r\n"),
        Some(Fault::Silence) => {
            let until_stopped = || stop.load(Ordering::SeqCst);
            while !until_stopped() && stream.peek(&mut [0]).is_ok_and(|count| count > 0) {
                std::thread::sleep(Duration::from_millis(20));
            }
            while !until_stopped() && is_open(&stream) {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
        Some(Fault::Endless) => {
            stream.write_all(b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n")?;
            while !stop.load(Ordering::SeqCst) {
                stream.write_all(&[b' '; 4096])?;
            }
            Ok(())
        }
        Some(Fault::EndlessHeaders) => {
            stream.write_all(b"HTTP/1.1 200 X\r\n")?;
            while !stop.load(Ordering::SeqCst) {
                stream.write_all(b"X-More: and more\r\n")?;
            }
            Ok(())
        }
    }
}

/// Whether the other side still reads.
fn is_open(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    match stream.peek(&mut [0]) {
        Ok(count) => count > 0,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

enum Found {
    Reply(Reply),
    /// A file's name, bytes and headers.
    File(String, Vec<u8>, Vec<(String, String)>),
}

fn find(state: &mut State, path: &str, request: &Request, storage: SocketAddr) -> Found {
    let reply = |status, code: &str| {
        let headers = [
            ("X-Error-Code", code),
            ("X-Error-Message", "said by the server"),
        ];
        Found::Reply(Reply::of(status, &headers, b"{}"))
    };
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let storage_path = |name: &str, file: &str| format!("/large/{name}/{file}");
    match parts[..] {
        ["large", owner, name, file] if request.to_storage => {
            let repository = state.repositories.get(&format!("{owner}/{name}"));
            match repository.and_then(|repository| repository.files.get(file)) {
                Some(bytes) => Found::File(file.into(), bytes.clone(), Vec::new()),
                None => Found::Reply(Reply::of(404, &[], b"")),
            }
        }
        ["cached", owner, name, file] => {
            let repository = state.repositories.get(&format!("{owner}/{name}"));
            match repository.and_then(|repository| repository.files.get(file)) {
                Some(bytes) => Found::File(
                    file.into(),
                    bytes.clone(),
                    file_headers(repository, file, bytes),
                ),
                None => Found::Reply(Reply::of(404, &[], b"")),
            }
        }
        ["api", "models", owner, name, "revision", revision] => {
            match allowed(state, owner, name, revision, request, false) {
                Err((status, code)) => reply(status, code),
                Ok(repository) => {
                    let fault = fault_of_listing(&mut state.faults);
                    match fault {
                        Some(Fault::Status(status, _)) => {
                            Found::Reply(Reply::of(status, &[], b"busy"))
                        }
                        _ => Found::Reply(Reply::of(200, &[], repository.answer().as_bytes())),
                    }
                }
            }
        }
        [owner, name, "resolve", revision, file] => {
            match allowed(state, owner, name, revision, request, true) {
                Err((status, code)) => reply(status, code),
                Ok(repository) => match repository.files.get(file) {
                    None => reply(404, "EntryNotFound"),
                    Some(bytes) if is_large(file) => {
                        let to = storage_path(&format!("{owner}/{name}"), file);
                        let mut headers = file_headers(Some(&repository), file, bytes);
                        headers.push((
                            "Location".into(),
                            format!("http://{storage}{to}?signature=x"),
                        ));
                        Found::Reply(Reply {
                            status: 302,
                            headers,
                            body: Vec::new(),
                        })
                    }
                    Some(_) if repository.small_files_redirect => {
                        let to = format!("/cached/{owner}/{name}/{file}");
                        Found::Reply(Reply::of(307, &[("Location", &to)], b""))
                    }
                    Some(bytes) => {
                        let headers = file_headers(Some(&repository), file, bytes);
                        Found::File(file.into(), bytes.clone(), headers)
                    }
                },
            }
        }
        _ => reply(404, "RepoNotFound"),
    }
}

/// Faults of the list of files are kept under the name `listing`.
fn fault_of_listing(faults: &mut BTreeMap<String, VecDeque<Fault>>) -> Option<Fault> {
    faults.get_mut("listing").and_then(VecDeque::pop_front)
}

fn file_headers(
    repository: Option<&Repository>,
    file: &str,
    bytes: &[u8],
) -> Vec<(String, String)> {
    let mut headers: Vec<(String, String)> = if is_large(file) {
        vec![
            ("ETag".into(), format!("\"{}\"", git_hash(b"pointer"))),
            ("X-Linked-Etag".into(), format!("\"{}\"", sha256(bytes))),
            ("X-Linked-Size".into(), bytes.len().to_string()),
            ("X-Repo-Commit".into(), COMMIT.into()),
        ]
    } else {
        vec![
            ("ETag".into(), format!("\"{}\"", git_hash(bytes))),
            ("X-Repo-Commit".into(), COMMIT.into()),
        ]
    };
    for (name, value) in repository.iter().flat_map(|repository| &repository.headers) {
        headers.retain(|(present, _)| !present.eq_ignore_ascii_case(name));
        if !value.is_empty() {
            headers.push((name.to_string(), value.clone()));
        }
    }
    headers
}

/// The repository, or the status and code of a refusal.
fn allowed(
    state: &State,
    owner: &str,
    name: &str,
    revision: &str,
    request: &Request,
    files: bool,
) -> Result<Repository, (u16, &'static str)> {
    let repository = state.repositories.get(&format!("{owner}/{name}"));
    let sent = request
        .authorization
        .as_deref()
        .and_then(|value| value.strip_prefix("Bearer "));
    let Some(repository) = repository else {
        // Without a token the Hub does not reveal which repositories are private.
        return Err((if sent.is_some() { 404 } else { 401 }, "RepoNotFound"));
    };
    if repository.private.is_some() && repository.private.as_deref() != sent {
        return Err((if sent.is_some() { 404 } else { 401 }, "RepoNotFound"));
    }
    if files && repository.gated.is_some() && repository.gated.as_deref() != sent {
        return Err((if sent.is_some() { 403 } else { 401 }, "GatedRepo"));
    }
    if ["main", "v1", COMMIT].contains(&revision) {
        Ok(repository.clone())
    } else {
        Err((404, "RevisionNotFound"))
    }
}

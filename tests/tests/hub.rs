//! Models by name: downloads from a server on this machine that implements the Hub's protocol,
//! correctly or with faults.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hub::{Hub, HubError, HubName, Need, Progress, Settings};
use serde_json::json;
use tests::hub_server::{COMMIT, Fault, HubServer, Repository, Request, git_hash, sha256};

const NAME: &str = "owner/model";

/// Bytes that differ in every file.
fn noise(length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|i| (i * i * 31 + i / 251) as u8)
        .collect()
}

/// A typical repository, with more files than are needed.
fn model() -> Repository {
    Repository::of(&[
        (".gitattributes", b"*"),
        ("README.md", b"# A model"),
        ("config.json", b"{\"model_type\": \"llama\"}"),
        ("tokenizer.json", b"{\"model\": {}}"),
        ("tokenizer_config.json", b"{}"),
        ("chat_template.jinja", b"{{ messages }}"),
        ("modeling_llama.py", b"import os"),
        ("pytorch_model.bin", b"pickle"),
        ("model.safetensors", &noise(3_000_000)),
    ])
}

struct Place {
    folder: tempfile::TempDir,
    server: HubServer,
}

impl Place {
    fn new(repository: Repository) -> Self {
        let place = Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            server: HubServer::start(),
        };
        place.server.put(NAME, repository);
        place
    }

    fn settings(&self) -> Settings {
        Settings {
            endpoint: self.server.endpoint(),
            token: None,
            cache: self.folder.path().join("hub"),
            offline: false,
            timeout: Duration::from_secs(1),
            retries: (3, Duration::from_millis(5)),
        }
    }

    fn get(&self, name: &str, need: Need) -> Result<PathBuf, HubError> {
        fetch(self.settings(), name, need)
    }

    fn offline(&self, name: &str, need: Need) -> Result<PathBuf, HubError> {
        let settings = Settings {
            offline: true,
            ..self.settings()
        };
        fetch(settings, name, need)
    }

    fn blobs(&self) -> PathBuf {
        self.folder.path().join("hub/models--owner--model/blobs")
    }

    /// Every file of the cache, by its path.
    fn files(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.expect("the folder can be read").path();
                if path.is_dir() {
                    walk(&path, found)
                } else {
                    found.push(path)
                }
            }
        }
        let mut found = Vec::new();
        walk(self.folder.path(), &mut found);
        let shown = |path: PathBuf| {
            let path = path.strip_prefix(self.folder.path()).map(Path::to_path_buf);
            path.unwrap_or_default().to_string_lossy().into_owned()
        };
        found.into_iter().map(shown).collect()
    }
}

fn fetch(settings: Settings, name: &str, need: Need) -> Result<PathBuf, HubError> {
    let name = HubName::parse(name).expect("the test's name is one");
    Hub::new(settings, Progress::hidden()).fetch(&name, need)
}

/// Requests for a file's bytes.
fn of_file<'r>(requests: &'r [Request], file: &str) -> Vec<&'r Request> {
    let end = format!("/{file}");
    let of_file = |request: &&Request| {
        request
            .path
            .split('?')
            .next()
            .is_some_and(|path| path.ends_with(&end))
    };
    requests.iter().filter(of_file).collect()
}

fn is_whole(folder: &Path, repository: &Repository, file: &str) {
    let got = fs::read(folder.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    assert!(got == repository.files[file], "{file} has other bytes");
}

// The files that are fetched, and their places.

#[test]
fn a_model_comes_into_the_standard_cache_without_code_and_pickles() {
    let place = Place::new(model());
    let folder = place.get(NAME, Need::Model).unwrap();
    let root = place.folder.path().join("hub/models--owner--model");
    assert_eq!(folder, root.join("snapshots").join(COMMIT));
    let mut names: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    for name in expected {
        is_whole(&folder, &model(), name);
    }
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    // Blobs have the names that Python's huggingface_hub gives them: SHA-256, or git's hash.
    let weights = &model().files["model.safetensors"];
    assert!(root.join("blobs").join(sha256(weights)).is_file());
    let config = &model().files["config.json"];
    assert!(root.join("blobs").join(git_hash(config)).is_file());
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(folder.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(sha256(weights))
    );
    assert!(
        !place
            .files()
            .iter()
            .any(|file| file.contains(".incomplete") || file.contains(".tmp"))
    );
    for file in ["pytorch_model.bin", "modeling_llama.py", "README.md"] {
        assert!(
            of_file(&place.server.requests(), file).is_empty(),
            "{file} was fetched"
        );
    }
}

#[test]
fn what_is_there_is_not_fetched_again() {
    let place = Place::new(model());
    let folder = place.get(NAME, Need::Text).unwrap();
    assert!(!folder.join("model.safetensors").exists());
    place.server.requests();
    place.get(NAME, Need::Model).unwrap();
    let requests = place.server.requests();
    assert!(
        of_file(&requests, "config.json").is_empty()
            && !of_file(&requests, "model.safetensors").is_empty()
    );
    place.get(NAME, Need::Model).unwrap();
    let requests = place.server.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(
        requests[0]
            .path
            .starts_with("/api/models/owner/model/revision/main")
    );
    // A commit never changes: no request is sent.
    let pinned = format!("{NAME}@{COMMIT}");
    assert_eq!(place.get(&pinned, Need::Model).unwrap(), folder);
    assert!(place.server.requests().is_empty());
}

#[test]
fn a_revision_is_fetched_and_remembered_under_its_name() {
    let place = Place::new(model());
    let folder = place.get("owner/model@v1", Need::Config).unwrap();
    is_whole(&folder, &model(), "config.json");
    assert!(
        place
            .files()
            .contains(&"hub/models--owner--model/refs/v1".to_string())
    );
    assert_eq!(
        place.offline("owner/model@v1", Need::Config).unwrap(),
        folder
    );
    let error = place.get("owner/model@v2", Need::Config).unwrap_err();
    assert!(matches!(error, HubError::NoRevision { .. }), "{error}");
    assert!(error.to_string().contains("\"v2\""), "{error}");
}

#[test]
fn a_mirror_without_sizes_and_hashes_tells_them_with_the_file() {
    let place = Place::new(Repository {
        without_sizes: true,
        ..model()
    });
    place.server.break_file(
        "model.safetensors",
        &[Fault::CutAfter(10), Fault::WrongBytes],
    );
    let folder = place.get(NAME, Need::Model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        is_whole(&folder, &model(), file);
    }
}

#[test]
fn small_files_behind_a_redirect_on_the_hub_keep_their_token() {
    let place = Place::new(Repository {
        small_files_redirect: true,
        private: Some("hf_mine".into()),
        ..model()
    });
    let settings = Settings {
        token: Some("hf_mine".into()),
        ..place.settings()
    };
    let folder = fetch(settings, NAME, Need::Model).unwrap();
    is_whole(&folder, &model(), "config.json");
    let requests = place.server.requests();
    assert!(
        requests
            .iter()
            .any(|request| request.path.starts_with("/cached/"))
    );
    for request in &requests {
        let expected = (!request.to_storage).then(|| "Bearer hf_mine".to_string());
        assert_eq!(request.authorization, expected, "{request:?}");
    }
    assert!(requests.iter().any(|request| request.to_storage));
}

fn sharded(index: serde_json::Value) -> Repository {
    let mut repository = model();
    repository.files.remove("model.safetensors");
    for shard in 1..=2 {
        let name = format!("model-0000{shard}-of-00002.safetensors");
        repository.files.insert(name, noise(1000 + shard));
    }
    let index = index.to_string().into_bytes();
    repository
        .files
        .insert("model.safetensors.index.json".into(), index);
    repository
}

#[test]
fn a_model_in_several_files_comes_whole() {
    let repository = sharded(json!({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}));
    let place = Place::new(repository.clone());
    let folder = place.get(NAME, Need::Model).unwrap();
    for shard in 1..=2 {
        is_whole(
            &folder,
            &repository,
            &format!("model-0000{shard}-of-00002.safetensors"),
        );
    }
    assert!(place.offline(NAME, Need::Model).is_ok());
    fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    let error = place.offline(NAME, Need::Model).unwrap_err().to_string();
    assert!(
        error.contains("model-00002-of-00002.safetensors"),
        "{error}"
    );
}

#[test]
fn an_index_leads_nowhere_else() {
    for file in [
        "../../../../stolen.safetensors",
        "/tmp/stolen.safetensors",
        "model-3.safetensors",
    ] {
        let place = Place::new(sharded(json!({"weight_map": {"a": file}})));
        let error = place.get(NAME, Need::Model).unwrap_err();
        assert!(matches!(error, HubError::Index { .. }), "{error}");
        assert!(!place.files().iter().any(|file| file.contains("stolen")));
    }
}

#[test]
fn an_adapter_comes_with_its_json() {
    let place = Place::new(Repository::of(&[
        ("adapter_config.json", b"{}"),
        ("adapter_model.safetensors", &noise(100)),
        ("optimizer.pt", b"pickle"),
        ("training_args.bin", b"pickle"),
        ("notes.json", b"[]"),
    ]));
    let folder = place.get(NAME, Need::Adapter).unwrap();
    assert_eq!(fs::read_dir(folder).unwrap().count(), 3);
}

// Faults during a transfer.

#[test]
fn a_download_goes_on_where_the_connection_was_cut_off() {
    let place = Place::new(model());
    let faults = [
        Fault::CutAfter(1_000_000),
        Fault::CutAfter(500_000),
        Fault::CutAfter(0),
    ];
    place.server.break_file("model.safetensors", &faults);
    let folder = place.get(NAME, Need::Model).unwrap();
    is_whole(&folder, &model(), "model.safetensors");
    let requests = place.server.requests();
    let ranges: Vec<_> = of_file(&requests, "model.safetensors")
        .iter()
        .filter(|request| request.to_storage)
        .map(|request| request.range.clone())
        .collect();
    let range = |from| Some(format!("bytes={from}-"));
    assert_eq!(
        ranges,
        [None, range(1_000_000), range(1_500_000), range(1_500_000)]
    );
}

#[test]
fn the_next_run_goes_on_where_one_gave_up() {
    let place = Place::new(model());
    let faults = [
        Fault::CutAfter(2_000_000),
        Fault::Status(503, None),
        Fault::Status(503, None),
        Fault::Status(503, None),
        Fault::Status(503, None),
    ];
    place.server.break_file("model.safetensors", &faults);
    let error = place.get(NAME, Need::Model).unwrap_err();
    assert!(matches!(error, HubError::NoConnection { .. }), "{error}");
    assert!(
        error.to_string().contains("503") && error.to_string().contains("the same command resumes"),
        "{error}"
    );
    let hash = sha256(&model().files["model.safetensors"]);
    let part = place.blobs().join(format!("{hash}.incomplete"));
    assert_eq!(fs::metadata(&part).unwrap().len(), 2_000_000);
    assert!(!place.blobs().join(&hash).exists());
    place.server.requests();
    let folder = place.get(NAME, Need::Model).unwrap();
    is_whole(&folder, &model(), "model.safetensors");
    let requests = place.server.requests();
    let last = of_file(&requests, "model.safetensors");
    assert_eq!(
        last.last().unwrap().range.as_deref(),
        Some("bytes=2000000-")
    );
    assert!(!part.exists());
}

#[test]
fn a_part_that_somebody_damaged_is_fetched_again() {
    let place = Place::new(model());
    place.get(NAME, Need::Text).unwrap();
    let hash = sha256(&model().files["model.safetensors"]);
    let part = place.blobs().join(format!("{hash}.incomplete"));
    for (length, byte) in [(1_000_000, 7), (3_000_000, 7), (4_000_000, 7)] {
        fs::write(&part, vec![byte; length]).unwrap();
        let folder = place.get(NAME, Need::Model).unwrap();
        is_whole(&folder, &model(), "model.safetensors");
        fs::remove_file(folder.join("model.safetensors")).unwrap();
        fs::remove_file(place.blobs().join(&hash)).unwrap();
    }
}

#[test]
fn a_server_that_does_not_continue_files_is_read_from_the_start() {
    let place = Place::new(model());
    place.server.break_file(
        "model.safetensors",
        &[Fault::CutAfter(1_000_000), Fault::WholeFile],
    );
    let folder = place.get(NAME, Need::Model).unwrap();
    is_whole(&folder, &model(), "model.safetensors");
}

#[test]
fn a_busy_hub_is_asked_again_after_the_time_that_it_names() {
    let place = Place::new(model());
    place
        .server
        .break_file("listing", &[Fault::Status(502, None)]);
    place.server.break_file(
        "model.safetensors",
        &[Fault::Status(429, Some(1)), Fault::Status(503, None)],
    );
    let started = Instant::now();
    let folder = place.get(NAME, Need::Model).unwrap();
    is_whole(&folder, &model(), "model.safetensors");
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[test]
fn wrong_bytes_never_reach_the_cache() {
    let place = Place::new(model());
    place
        .server
        .break_file("model.safetensors", &[Fault::WrongBytes]);
    is_whole(
        &place.get(NAME, Need::Model).unwrap(),
        &model(),
        "model.safetensors",
    );

    let place = Place::new(model());
    for file in ["config.json", "model.safetensors"] {
        place
            .server
            .break_file(file, &[Fault::WrongBytes, Fault::WrongBytes]);
        let error = place.get(NAME, Need::Model).unwrap_err();
        assert!(matches!(error, HubError::Damaged { .. }), "{error}");
        let bytes = &model().files[file];
        let hash = if file.ends_with(".json") {
            git_hash(bytes)
        } else {
            sha256(bytes)
        };
        assert!(
            error.to_string().contains(&hash) && error.to_string().contains(file),
            "{error}"
        );
        assert!(
            !place
                .files()
                .iter()
                .any(|file| file.contains(&hash) && !file.ends_with(".lock"))
        );
    }
    assert!(place.get(NAME, Need::Model).is_ok());
}

#[test]
fn a_damaged_small_file_of_the_cache_is_fetched_again() {
    let place = Place::new(model());
    let folder = place.get(NAME, Need::Model).unwrap();
    fs::write(folder.join("config.json"), "{\"model_type\": \"gpt-2\"}").unwrap();
    fs::write(folder.join("model.safetensors"), "short").unwrap();
    let folder = place.get(NAME, Need::Model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        is_whole(&folder, &model(), file);
    }
}

#[test]
fn two_runs_at_once_fetch_a_file_once() {
    let place = Place::new(model());
    place.server.delay(Duration::from_millis(100));
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| place.get(NAME, Need::Model)))
            .collect();
        for run in runs {
            let folder = run.join().unwrap().unwrap();
            is_whole(&folder, &model(), "model.safetensors");
        }
    });
    let requests = place.server.requests();
    let bodies = of_file(&requests, "model.safetensors");
    assert_eq!(
        bodies.iter().filter(|request| request.to_storage).count(),
        1
    );
}

// Access rights.

#[test]
fn a_gated_model_says_the_steps_and_comes_with_the_right_token() {
    let place = Place::new(Repository {
        gated: Some("hf_accepted".into()),
        ..model()
    });
    let with = |token: Option<&str>| {
        let settings = Settings {
            token: token.map(String::from),
            ..place.settings()
        };
        fetch(settings, NAME, Need::Model)
    };
    for (token, detail) in [
        (None, "No token was sent"),
        (Some("hf_other"), "does not open it"),
    ] {
        let error = with(token).unwrap_err();
        assert!(matches!(error, HubError::Gated { .. }), "{error}");
        let error = error.to_string();
        for part in [
            detail,
            "accept",
            "/settings/tokens",
            "HF_TOKEN",
            "hf auth login",
            "said by the server",
        ] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
    }
    let folder = with(Some("hf_accepted")).unwrap();
    is_whole(&folder, &model(), "model.safetensors");
    // The storage of large files is another party's machine.
    let to_storage: Vec<_> = place
        .server
        .requests()
        .into_iter()
        .filter(|request| request.to_storage)
        .collect();
    assert!(
        !to_storage.is_empty()
            && to_storage
                .iter()
                .all(|request| request.authorization.is_none())
    );
}

#[test]
fn a_repository_that_is_not_there_or_not_shown_says_so() {
    let place = Place::new(model());
    let error = place.get("owner/other", Need::Model).unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("neither a folder") && error.contains("without a token"),
        "{error}"
    );
    let settings = Settings {
        token: Some("hf_x".into()),
        ..place.settings()
    };
    let error = fetch(settings, "owner/other", Need::Model).unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
}

#[test]
fn pickles_and_other_formats_are_named() {
    let mut repository = model();
    repository.files.remove("model.safetensors");
    let place = Place::new(repository.clone());
    let error = place.get(NAME, Need::Model).unwrap_err();
    assert!(matches!(error, HubError::PickleOnly { .. }), "{error}");
    assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
    repository.files.remove("pytorch_model.bin");
    repository.files.insert("model.Q4_K_M.gguf".into(), vec![]);
    place.server.put(NAME, repository);
    let error = place.get(NAME, Need::Model).unwrap_err().to_string();
    assert!(error.contains("model.Q4_K_M.gguf"), "{error}");
    // Nothing was downloaded for a model that cannot be used.
    assert!(!place.files().iter().any(|file| file.contains("blobs")));
}

// Without a connection.

#[test]
fn without_a_connection_the_cache_serves_and_what_is_missing_says_what_to_do() {
    let place = Place::new(model());
    let folder = place.get(NAME, Need::Model).unwrap();
    place.server.requests();
    assert_eq!(place.offline(NAME, Need::Model).unwrap(), folder);
    assert!(place.server.requests().is_empty(), "offline means offline");
    let nobody = Settings {
        // Port 9 discards data; a service on it would not speak HTTP.
        endpoint: "http://127.0.0.1:9".into(),
        ..place.settings()
    };
    assert_eq!(fetch(nobody.clone(), NAME, Need::Model).unwrap(), folder);
    let error = fetch(nobody, "owner/other", Need::Model).unwrap_err();
    assert!(matches!(error, HubError::NoConnection { .. }), "{error}");
    let error = error.to_string();
    for part in ["127.0.0.1:9", "hf download owner/other", "HF_ENDPOINT"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    let error = place.offline("owner/other", Need::Model).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    let error = place.offline(NAME, Need::Model).unwrap_err().to_string();
    assert!(error.contains("has no tokenizer.json"), "{error}");
}

#[test]
fn a_disk_that_is_too_small_is_noticed_before_anything_is_fetched() {
    let mut repository = model();
    repository
        .stated_sizes
        .insert("model.safetensors".into(), 1 << 60);
    let place = Place::new(repository);
    let error = place.get(NAME, Need::Model).unwrap_err();
    assert!(matches!(error, HubError::NoSpace { .. }), "{error}");
    assert!(error.to_string().contains("HF_HOME"), "{error}");
    assert!(of_file(&place.server.requests(), "model.safetensors").is_empty());
}

// Servers that must not be trusted.

/// An error in good time, and no file outside the cache's own folders.
fn refuses(place: &Place, what: &str) -> HubError {
    let started = Instant::now();
    let error = match place.get(NAME, Need::Model) {
        Err(error) => error,
        Ok(folder) => panic!("{what}: {} was accepted", folder.display()),
    };
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{what} took {:?}",
        started.elapsed()
    );
    for file in place.files() {
        let expected = file.starts_with("hub/models--owner--model/")
            || file.starts_with("hub/.locks/models--owner--model/");
        assert!(expected, "{what}: {file}");
    }
    error
}

#[test]
fn answers_that_are_no_list_of_files_are_errors() {
    let commit =
        |sha: &str, file: serde_json::Value| json!({"sha": sha, "siblings": [file]}).to_string();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for listing in [
        "",
        "<html>log in</html>",
        "[]",
        "{\"sha\": 1}",
        &deep,
        &commit("../../../../tmp/x", json!({"rfilename": "config.json"})),
        &commit(COMMIT, json!({"rfilename": "../config.json", "size": 1})),
        &commit(
            COMMIT,
            json!({"rfilename": "config.json", "size": u64::MAX, "blobId": "a".repeat(40)}),
        ),
        &commit(COMMIT, json!({"rfilename": 5})),
    ] {
        let place = Place::new(Repository {
            listing: Some(listing.to_string()),
            ..model()
        });
        refuses(&place, &listing[..listing.len().min(100)]);
    }
}

#[test]
fn headers_lead_nowhere_else() {
    let hostile = "\"../../../../../stolen\"".to_string();
    for (name, value) in [
        ("ETag", hostile.clone()),
        ("X-Linked-Etag", hostile),
        ("X-Linked-Etag", String::new()),
    ] {
        let place = Place::new(Repository {
            without_sizes: true,
            headers: vec![(name, value), ("ETag", "\"x/../../y\"".into())],
            ..model()
        });
        // An etag that is not a hash names no file and proves nothing; the sizes are still checked.
        let folder = place.get(NAME, Need::Model).unwrap();
        is_whole(&folder, &model(), "model.safetensors");
        for file in place.files() {
            assert!(!file.contains("stolen") && !file.ends_with("/y"), "{file}");
        }
    }
    for size in ["99999999999999999999999", "-1", "4"] {
        let place = Place::new(Repository {
            without_sizes: true,
            headers: vec![("X-Linked-Size", size.into())],
            ..model()
        });
        let result = place.get(NAME, Need::Model);
        // A value that is not a number is ignored; a wrong number is not believed against the
        // bytes.
        assert_eq!(result.is_err(), size == "4", "{size}: {result:?}");
    }
}

#[test]
fn bodies_that_lie_are_errors_and_never_hang() {
    for file in ["config.json", "model.safetensors"] {
        for (fault, times) in [
            (Fault::Endless, 1),
            (Fault::EndlessHeaders, 8),
            (Fault::Garbage, 8),
            (Fault::Silence, 8),
            (Fault::WrongRange, 0),
            (Fault::Redirect("file:///etc/passwd".into()), 1),
            (Fault::Redirect("".into()), 1),
            (Fault::Status(418, None), 1),
        ] {
            let place = Place::new(model());
            place.server.break_file(file, &vec![fault.clone(); times]);
            if fault == Fault::WrongRange {
                place
                    .server
                    .break_file(file, &[Fault::CutAfter(5), Fault::WrongRange]);
            }
            let error = refuses(&place, &format!("{file}: {fault:?}"));
            let known = matches!(
                error,
                HubError::Protocol { .. } | HubError::NoConnection { .. }
            );
            assert!(known, "{fault:?}: {error}");
        }
    }
}

#[test]
fn redirects_in_a_circle_end() {
    let place = Place::new(model());
    let to = format!(
        "{}/{NAME}/resolve/{COMMIT}/config.json",
        place.server.endpoint()
    );
    place
        .server
        .break_file("config.json", &vec![Fault::Redirect(to); 100]);
    let error = refuses(&place, "a circle").to_string();
    assert!(error.contains("redirects"), "{error}");
}

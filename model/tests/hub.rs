//! Models by Hugging Face id, from a small server in this process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nibble_model::checkpoint::{Checkpoint, CheckpointWriter};
use nibble_model::hub::{HubSettings, fetch};
use safetensors::Dtype;

const ID: &str = "nibble-test/tiny";
/// The server hangs up in the middle of this file.
const CUT_FILE: &str = "model-00002-of-00003.safetensors";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A server of one model, until the process ends.
struct Server {
    endpoint: String,
    /// `GET` paths, in order, and whether each had a token.
    requests: Arc<Mutex<Vec<(String, bool)>>>,
}

impl Server {
    fn start(files: BTreeMap<String, Vec<u8>>, token: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &files, token, &log);
            }
        });
        Self { endpoint, requests }
    }

    fn settings(&self, cache: &Path) -> HubSettings {
        let endpoint = self.endpoint.clone();
        HubSettings { endpoint, cache: cache.to_owned(), token: None, offline: false }
    }

    /// The files that were asked for since the last call, in order, each once.
    fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = std::mem::take(&mut *self.requests.lock().unwrap())
            .into_iter()
            .filter_map(|(path, _)| path.rsplit_once("/resolve/main/").map(|(_, file)| file.to_owned()))
            .collect();
        files.dedup();
        files
    }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    token: Option<&str>,
    log: &Mutex<Vec<(String, bool)>>,
) {
    let lines: Vec<String> = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .collect();
    let header = |name: &str| {
        lines.iter().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    };
    let Some(path) = lines.first().and_then(|line| line.split(' ').nth(1)) else { return };
    let authorization = header("authorization");
    log.lock().unwrap().push((path.to_owned(), authorization.is_some()));
    let allowed = token.is_none_or(|token| authorization == Some(&format!("Bearer {token}")));
    let file = path.strip_prefix(&format!("/{ID}/resolve/main/")).and_then(|file| files.get_key_value(file));
    let (status, headers, body) = match file {
        // The middle of a weight file never arrives: the connection ends before.
        Some((name, bytes)) if name == CUT_FILE && header("range") != Some("bytes=0-0") => {
            let head = format!("HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\n\r\n", bytes.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes[..1]));
            return;
        }
        _ if !allowed => ("401 Unauthorized", String::new(), Vec::new()),
        Some((name, bytes)) => {
            let range = header("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
            let (start, end) = range.unwrap_or(("0", ""));
            let start: usize = start.parse().unwrap();
            let end = end.parse().map_or(bytes.len(), |end: usize| (end + 1).min(bytes.len()));
            let total = bytes.len();
            let headers = format!(
                "ETag: \"{name}-{total}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{total}\r\n",
                end - 1
            );
            ("206 Partial Content", headers, bytes[start..end].to_vec())
        }
        None if path == format!("/api/models/{ID}/revision/main") => {
            let siblings: Vec<_> =
                files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
            let body = serde_json::json!({ "sha": COMMIT, "siblings": siblings });
            ("200 OK", String::new(), body.to_string().into_bytes())
        }
        None => ("404 Not Found", String::new(), Vec::new()),
    };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
    // A client that has hung up is its own affair.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

/// The files of a checkpoint of two tensors in shards of at most `max_shard_bytes`, and others beside them.
fn model_files(max_shard_bytes: u64) -> BTreeMap<String, Vec<u8>> {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let mut writer = CheckpointWriter::create(&directory, max_shard_bytes).unwrap();
    writer.tensor("a", Dtype::F32, &[2], &[1; 8]).unwrap();
    writer.tensor("b", Dtype::F32, &[2], &[2; 8]).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    });
    writer.file("config.json", config.to_string().as_bytes()).unwrap();
    writer.file("tokenizer.json", b"{}").unwrap();
    writer.file("README.md", b"not needed").unwrap();
    writer.file("consolidated.safetensors", b"not needed either").unwrap();
    writer.finish().unwrap();
    let entries = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect()
}

#[test]
fn a_model_is_fetched_once_with_the_files_it_needs_and_no_others() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(model_files(8), None);
    let mut seen = Vec::new();
    let directory = fetch(ID, &server.settings(cache.path()), &mut |progress| {
        assert!(progress.bytes_done <= progress.bytes);
        seen.push((progress.file.to_owned(), progress.bytes_done == progress.bytes));
    })
    .unwrap();
    let checkpoint = Checkpoint::open(&directory).unwrap();
    assert_eq!(checkpoint.tensors().count(), 2);
    let expected = [
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    assert_eq!(server.files(), expected);
    assert!(expected.iter().all(|file| seen.contains(&(file.to_string(), true))), "{seen:?}");
    assert!(directory.starts_with(cache.path().join("models--nibble-test--tiny/snapshots").join(COMMIT)));

    assert_eq!(fetch(ID, &server.settings(cache.path()), &mut |_| {}).unwrap(), directory);
    assert!(server.files().is_empty(), "what is in the cache is not fetched again");
    let nobody = HubSettings { endpoint: "http://127.0.0.1:9".to_owned(), ..server.settings(cache.path()) };
    assert_eq!(
        fetch(ID, &nobody, &mut |_| {}).unwrap(),
        directory,
        "the cache serves while the network is down"
    );
    let offline = HubSettings { offline: true, ..nobody };
    assert_eq!(fetch(ID, &offline, &mut |_| {}).unwrap(), directory);
}

#[test]
fn a_model_of_one_weight_file_is_fetched_with_the_token() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(model_files(u64::MAX), Some("secret"));
    let error = fetch(ID, &server.settings(cache.path()), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains(ID) && error.contains("401") && error.contains("HF_TOKEN"), "{error}");
    let settings = HubSettings { token: Some("secret".to_owned()), ..server.settings(cache.path()) };
    let directory = fetch(ID, &settings, &mut |_| {}).unwrap();
    assert_eq!(Checkpoint::open(&directory).unwrap().tensors().count(), 2);
    assert_eq!(server.files(), ["config.json", "tokenizer.json", "model.safetensors"]);
}

#[test]
fn a_download_that_breaks_off_is_an_error_and_what_arrived_is_not_taken_for_the_file() {
    let cache = tempfile::tempdir().unwrap();
    let mut files = model_files(8);
    files.insert(CUT_FILE.to_owned(), vec![0; 100]);
    let index = serde_json::json!({ "weight_map": { "a": CUT_FILE } });
    files.insert("model.safetensors.index.json".to_owned(), index.to_string().into_bytes());
    let settings = Server::start(files, None).settings(cache.path());
    for _ in 0..2 {
        let error = fetch(ID, &settings, &mut |_| {}).unwrap_err().to_string();
        assert!(
            error.contains(ID) && error.contains(CUT_FILE) && error.contains("run the command again"),
            "{error}"
        );
    }
    let offline = HubSettings { offline: true, ..settings };
    assert!(fetch(ID, &offline, &mut |_| {}).is_err());
}

#[test]
fn what_cannot_be_fetched_is_named_with_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(model_files(u64::MAX), None);
    let settings = server.settings(cache.path());
    let failed = |id: &str, settings: &HubSettings| fetch(id, settings, &mut |_| {}).unwrap_err().to_string();
    let error = failed("nibble-test/other", &settings);
    assert!(
        error.contains("nibble-test/other") && error.contains("404") && error.contains("check the id"),
        "{error}"
    );
    let offline = HubSettings { offline: true, ..settings.clone() };
    let error = failed(ID, &offline);
    assert!(
        error.contains(ID) && error.contains("config.json") && error.contains("HF_HUB_OFFLINE"),
        "{error}"
    );
    let nobody = HubSettings { endpoint: "http://127.0.0.1:9".to_owned(), ..settings };
    let error = failed(ID, &nobody);
    assert!(
        error.contains(ID) && error.contains("http://127.0.0.1:9") && error.contains("HF_ENDPOINT"),
        "{error}"
    );

    let files = BTreeMap::from([("config.json".to_owned(), b"{}".to_vec()), ("x.gguf".to_owned(), vec![0])]);
    let error = failed(ID, &Server::start(files, None).settings(cache.path()));
    assert!(error.contains("model.safetensors") && error.contains("download x.gguf"), "{error}");
}

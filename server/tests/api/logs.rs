//! What is logged of a request.

use std::io::Write;
use std::sync::{Arc, Mutex};

use nibble_server::{ApiKeys, ServerOptions};
use serde_json::json;

use crate::support::{COMPLETIONS, Options, Server, post};

/// Keeps what is written.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn lines_of_a_request_have_its_id_also_within_a_stream_and_never_its_key() {
    let log = Log::default();
    let writer = {
        let log = log.clone();
        move || log.clone()
    };
    // For all tests of this process: what tracing remembers of a line is not a thread's.
    let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    tracing::callsite::rebuild_interest_cache();
    let api_keys = Arc::new(ApiKeys::new(&["a-secret-key".to_owned()], None).unwrap());
    let server = ServerOptions { api_keys, ..ServerOptions::default() };
    let server = Server::with(Options { server, failing_step: Some(2), ..Options::default() });
    let mut request = post(COMPLETIONS, json!({"prompt": "a", "temperature": 0, "stream": true}).to_string());
    request.headers_mut().insert("x-request-id", "logged-request".parse().unwrap());
    request.headers_mut().insert("authorization", "Bearer a-secret-key".parse().unwrap());
    let (_, headers, body) = server.send(request).await;
    assert_eq!(headers["x-request-id"], "logged-request");
    assert!(body.contains("the device is gone"));
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let of_request: Vec<&str> =
        log.lines().filter(|line| line.contains("request{id=logged-request}")).collect();
    for message in ["answered", "stream failed"] {
        assert!(of_request.iter().any(|line| line.contains(message)), "{message} in {log}");
    }
    assert!(!log.contains("a-secret-key"), "{log}");
}

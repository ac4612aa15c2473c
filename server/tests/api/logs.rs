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
    let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
    // For this thread, on which everything but the engine runs.
    let _logged = tracing::subscriber::set_default(subscriber);
    let api_keys = Arc::new(ApiKeys::new(&["secret".to_owned()], None).unwrap());
    let server = ServerOptions { api_keys, ..ServerOptions::default() };
    let server = Server::with(Options { server, failing_step: Some(2), ..Options::default() });
    let mut request = post(COMPLETIONS, json!({"prompt": "a", "temperature": 0, "stream": true}).to_string());
    request.headers_mut().insert("x-request-id", "mine".parse().unwrap());
    request.headers_mut().insert("authorization", "Bearer secret".parse().unwrap());
    let (_, headers, body) = server.send(request).await;
    assert_eq!(headers["x-request-id"], "mine");
    assert!(body.contains("the device is gone"));
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for line in ["answered", "stream failed"] {
        let line =
            log.lines().find(|found| found.contains(line)).unwrap_or_else(|| panic!("{line} in {log}"));
        assert!(line.contains("request{id=mine}"), "{line}");
    }
    assert!(!log.contains("secret"), "{log}");
}

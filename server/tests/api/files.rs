//! Keys and certificates from files, which SIGHUP reads again.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use nibble_server::{ApiKeys, ServeOptions, ServerOptions, Tls};
use rustix::process::{Signal, getpid, kill_process};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};

use crate::support::{COMPLETIONS, Options, Server, ask};

/// Asks until the answer is as wanted: a signal takes its time.
async fn eventually<T: PartialEq + std::fmt::Debug>(wanted: T, ask: impl AsyncFn() -> T) {
    let started = Instant::now();
    loop {
        let found = ask().await;
        if found == wanted {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{found:?}, expected {wanted:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_rotated_by_a_signal_without_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys");
    std::fs::write(&path, "old").unwrap();
    let api_keys = Arc::new(ApiKeys::new(&[], Some(&path)).unwrap());
    let server = ServerOptions { api_keys, ..ServerOptions::default() };
    let server = Server::with(Options { server, ..Options::default() });
    let serving = server.serve(None, ServeOptions::default()).await;
    let status = async |key: &str| {
        ask(&serving.address, "GET /health").await;
        let request = Request::get("/v1/models").header("authorization", format!("Bearer {key}"));
        server.send(request.body(Body::empty()).unwrap()).await.0.as_u16()
    };
    assert_eq!((status("old").await, status("new").await), (200, 401));
    std::fs::write(&path, "team:new").unwrap();
    kill_process(getpid(), Signal::HUP).unwrap();
    eventually((401, 200), async || (status("old").await, status("new").await)).await;
    std::fs::write(&path, "").unwrap();
    kill_process(getpid(), Signal::HUP).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(status("new").await, 200, "a bad file changes nothing");
}

/// Writes a certificate for `name` and its key.
pub(crate) fn write_certificate(directory: &Path, name: &str) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    std::fs::write(directory.join("certificate.pem"), made.cert.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
}

pub(crate) fn open(directory: &Path) -> Result<Tls, nibble_server::TlsError> {
    Tls::open(&directory.join("certificate.pem"), &directory.join("key.pem"))
}

/// Of a client that trusts the certificate in `directory` alone.
pub(crate) fn client_config(directory: &Path) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(directory.join("certificate.pem")).unwrap()).unwrap();
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// A client that trusts the certificate in `directory` alone, and takes "localhost" for `address`.
fn client(directory: &Path, address: &str) -> ureq::Agent {
    let config = client_config(directory);
    let address = address.parse().unwrap();
    ureq::AgentBuilder::new().tls_config(Arc::new(config)).resolver(move |_: &str| Ok(vec![address])).build()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_trusts_the_certificate_is_answered_over_tls_and_after_a_renewal() {
    let directory = tempfile::tempdir().unwrap();
    write_certificate(directory.path(), "localhost");
    let server = Server::new();
    let tls = Arc::new(open(directory.path()).unwrap());
    let serving = server.serve(Some(Arc::clone(&tls)), ServeOptions::default()).await;
    let url = "https://localhost".to_owned() + COMPLETIONS;
    let post = async |agent: ureq::Agent| {
        let url = url.clone();
        let body = json!({"prompt": "x", "temperature": 0}).to_string();
        let ask = move || {
            let answer = agent.post(&url).set("content-type", "application/json").send_string(&body);
            answer
                .map_err(Box::new)
                .map(|answer| serde_json::from_reader::<_, Value>(answer.into_reader()).unwrap())
        };
        tokio::task::spawn_blocking(ask).await.unwrap()
    };
    let before = client(directory.path(), &serving.address);
    assert_eq!(post(before.clone()).await.unwrap()["choices"][0]["text"], "yz");
    // Plain HTTP is no handshake.
    let mut plain = tokio::net::TcpStream::connect(&serving.address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut plain, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut plain, &mut answer).await;
    assert!(!answer.starts_with(b"HTTP"));
    // A renewed certificate counts for new connections.
    write_certificate(directory.path(), "localhost");
    kill_process(getpid(), Signal::HUP).unwrap();
    eventually(true, async || post(client(directory.path(), &serving.address)).await.is_ok()).await;
    // A key of another certificate changes nothing.
    let trusted = client(directory.path(), &serving.address);
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(directory.path().join("key.pem"), other.signing_key.serialize_pem()).unwrap();
    assert!(tls.reload().is_err());
    assert_eq!(post(trusted).await.unwrap()["choices"][0]["text"], "yz");
}

#[test]
fn wrong_files_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let message = || open(directory.path()).unwrap_err().to_string();
    assert!(message().contains("certificate.pem: expected certificates"), "{}", message());
    write_certificate(directory.path(), "localhost");
    open(directory.path()).unwrap();
    let (certificate, key) = (directory.path().join("certificate.pem"), directory.path().join("key.pem"));
    let good = std::fs::read(&key).unwrap();
    std::fs::write(&key, "not a key").unwrap();
    assert!(message().contains("key.pem: expected a private key"), "{}", message());
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(&key, other.signing_key.serialize_pem()).unwrap();
    assert!(message().contains("cannot be used with the key"), "{}", message());
    std::fs::write(&key, good).unwrap();
    std::fs::write(&certificate, "").unwrap();
    assert!(message().contains("certificate.pem: expected certificates"), "{}", message());
}

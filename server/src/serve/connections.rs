//! Connections: accepted up to a number, each with limits of its own, and let go in order.
//!
//! `axum::serve` sets no limits; this is its loop with them, over plain TCP or TLS.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use super::tls::Tls;

/// Pause after the system refused a connection, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What a connection may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Most connections at once; more wait in the system's queue.
    pub connections: usize,
    /// Time for a TLS handshake, and for a request's head; also how long a connection may be idle.
    pub head_timeout: Duration,
    /// Time in which a client must take at least something of what is sent to it.
    pub write_timeout: Duration,
    /// Most bytes of a request's head.
    pub head_bytes: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            head_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            head_bytes: 64 << 10,
        }
    }
}

/// An address that is served.
#[derive(Debug)]
pub struct Socket {
    /// Where connections come from.
    pub listener: TcpListener,
    /// Their encryption, if any.
    pub tls: Option<Arc<Tls>>,
}

/// Answers the connections of `socket` by `router` until `stop` is ready, then accepts no more, and returns when
/// those there are have had their answers.
pub(super) async fn accept(
    socket: Socket,
    router: Router,
    limits: ConnectionLimits,
    stop: impl Future<Output = ()>,
) {
    let Socket { listener, tls } = socket;
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut stop = std::pin::pin!(stop);
    loop {
        let next = async {
            // Nobody closes the semaphore.
            let place = Arc::clone(&places).acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = &mut stop => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = Connection {
                    router: router.clone(),
                    limits,
                    tls: tls.clone(),
                    watcher: graceful.watcher(),
                };
                tokio::spawn(async move {
                    connection.serve(stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    graceful.shutdown().await;
}

/// What serves one connection.
struct Connection {
    router: Router,
    limits: ConnectionLimits,
    tls: Option<Arc<Tls>>,
    watcher: Watcher,
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        // Each event of a stream is a small packet that must not wait for the next one.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection keeps delaying small packets");
        }
        let Some(tls) = &self.tls else { return self.answer(stream).await };
        match tokio::time::timeout(self.limits.head_timeout, tls.acceptor().accept(stream)).await {
            Ok(Ok(stream)) => self.answer(stream).await,
            Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
            Err(_) => tracing::debug!("a TLS handshake took too long"),
        }
    }

    async fn answer(self, stream: impl AsyncRead + AsyncWrite + 'static) {
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.limits.write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head_timeout)
            .max_header_size(self.limits.head_bytes)
            .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(self.router));
        if let Err(error) = self.watcher.watch(connection).await {
            tracing::debug!(%error, "a connection broke off");
        }
    }
}

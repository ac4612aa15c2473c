//! Connections: accepted up to a number, each with limits of its own, and let go in order.
//!
//! `axum::serve` sets no limits; this is its loop with them, over plain TCP or TLS, for HTTP/1.1 and HTTP/2: the first
//! bytes of a connection say which it is, after a TLS handshake that agreed on it, or by prior knowledge.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use http::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_io_timeout::TimeoutStream;

use super::answers::OpenAnswers;
use super::tls::Tls;
use super::told;

/// Pause after the system refused a connection, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Shortest time from one look at the answers of a connection to the next.
const SHORTEST_LOOK: Duration = Duration::from_millis(1);
/// Most bytes of an answer that wait in memory until its client of HTTP/2 takes them.
const SEND_BUFFER_BYTES: usize = 64 << 10;

/// What a connection may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Most connections at once; more wait in the system's queue.
    pub connections: usize,
    /// Time for a TLS handshake, and for a request's head; also how long a connection may be idle.
    pub head_timeout: Duration,
    /// Time in which a client must take at least something of what is sent to it; over HTTP/2, of every answer.
    pub write_timeout: Duration,
    /// Most bytes of a request's head.
    pub head_bytes: usize,
    /// Most requests at once on a connection of HTTP/2.
    pub streams: u32,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            head_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            head_bytes: 64 << 10,
            streams: 256,
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

/// Answers the connections of `socket` by `router` until `stop` says so, then accepts no more, and returns when
/// those there are have had their answers.
pub(super) async fn accept(
    socket: Socket,
    router: Router,
    limits: ConnectionLimits,
    stop: watch::Receiver<bool>,
) {
    let Socket { listener, tls } = socket;
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut stopped = std::pin::pin!(told(stop.clone()));
    loop {
        let next = async {
            // Nobody closes the semaphore.
            let place = Arc::clone(&places).acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = &mut stopped => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let (router, tls, stop) = (router.clone(), tls.clone(), stop.clone());
                let connection = Connection { router, limits, tls, stop };
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
    // All places are free when no connection is left.
    let _ = places.acquire_many(limits.connections.try_into().unwrap_or(u32::MAX)).await;
}

/// What serves one connection.
struct Connection {
    router: Router,
    limits: ConnectionLimits,
    tls: Option<Arc<Tls>>,
    stop: watch::Receiver<bool>,
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
        let Self { router, limits, stop, .. } = self;
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.write_timeout));
        let answers = Arc::new(OpenAnswers::new());
        let router = TowerToHyperService::new(router);
        let service = service_fn(|request: Request<Incoming>| {
            let place = answers.begin(request.version());
            let response = router.call(request);
            async move { Ok::<_, Infallible>(response.await?.map(|body| place.answer(body))) }
        });
        let builder = builder(&limits);
        let mut connection =
            std::pin::pin!(builder.serve_connection(TokioIo::new(Box::pin(stream)), service));
        let mut stopped = std::pin::pin!(told(stop));
        let mut looks = interval((limits.head_timeout.min(limits.write_timeout) / 4).max(SHORTEST_LOOK));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // When the connection was asked to end.
        let mut ending: Option<Instant> = None;
        loop {
            tokio::select! {
                end = connection.as_mut() => {
                    if let Err(error) = end {
                        tracing::debug!(%error, "a connection broke off");
                    }
                    return;
                }
                () = &mut stopped, if ending.is_none() => {}
                _ = looks.tick() => {
                    answers.give_up_untaken(limits.write_timeout);
                    if answers.idle_for() < limits.head_timeout {
                        continue;
                    }
                    // Nothing is open, and the client does not let go of it either.
                    if ending.is_some_and(|since| since.elapsed() >= limits.write_timeout) {
                        tracing::debug!("an idle connection is given up");
                        return;
                    }
                }
            }
            // What is open is finished.
            connection.as_mut().graceful_shutdown();
            ending.get_or_insert_with(Instant::now);
        }
    }
}

/// What speaks HTTP on a connection.
fn builder(limits: &ConnectionLimits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        // A head must fit the buffer; less than this hyper does not take.
        .max_buf_size(limits.head_bytes.max(8 << 10));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(limits.head_bytes.try_into().unwrap_or(u32::MAX))
        .max_send_buf_size(SEND_BUFFER_BYTES)
        // A client that is gone without a word is found out by a ping.
        .keep_alive_interval(limits.head_timeout)
        .keep_alive_timeout(limits.write_timeout);
    builder
}

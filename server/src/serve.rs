//! From a bound socket to a stopped server: accept, and on a signal finish what was accepted.

use std::time::{Duration, Instant};

use axum::Router;
use axum::serve::ListenerExt;
use nibble_engine::{EngineHandle, Health};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// How often the engine's health is looked at.
const HEALTH_INTERVAL: Duration = Duration::from_millis(200);
/// Time that the step in flight has at the drain deadline.
const LAST_STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Time that responses have to reach their clients after the engine has stopped.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a server stopped, other than being told to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The operating system refused a socket or a signal handler.
    #[error("the server cannot listen: {0}")]
    Listen(#[from] std::io::Error),
    /// The metrics contradict each other.
    #[error("the metrics cannot be set up: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The engine died.
    #[error("the engine has failed: {message}")]
    EngineFailed {
        /// What it died of.
        message: String,
    },
    /// The engine hangs in a step.
    #[error("the engine did not end its last step; its thread is left behind")]
    EngineStuck,
}

/// Why the server begins to stop.
enum Cause {
    Signal,
    EngineFailed { message: String },
}

/// Serves until SIGTERM or SIGINT, then accepts no more, lets the engine finish what it accepted within
/// `drain_timeout`, and returns. Also returns when the engine dies, so that a supervisor starts it anew.
///
/// # Errors
/// When the socket or the engine fails.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    engine: EngineHandle,
    drain_timeout: Duration,
) -> Result<(), ServerError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async move {
        // A sender that is gone means the same as a message.
        let _ = stopped.await;
    };
    // Each event of a stream is a small packet that must not wait for the next one.
    let listener = listener.tap_io(|connection| {
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "a connection keeps delaying small packets");
        }
    });
    let server = tokio::spawn(axum::serve(listener, router).with_graceful_shutdown(shutdown).into_future());
    let cause = tokio::select! {
        _ = terminate.recv() => Cause::Signal,
        _ = interrupt.recv() => Cause::Signal,
        message = failure(&engine) => Cause::EngineFailed { message },
    };
    // The receiver lives as long as the server, which nothing else has ended.
    let _ = stop.send(());
    let result = match cause {
        Cause::EngineFailed { message } => Err(ServerError::EngineFailed { message }),
        Cause::Signal => {
            tracing::info!(seconds = drain_timeout.as_secs(), "told to stop: finishing what was accepted");
            engine.drain(Instant::now() + drain_timeout);
            let end = tokio::select! {
                end = tokio::time::timeout(drain_timeout + LAST_STEP_TIMEOUT, ended(&engine)) => end,
                // Whoever asks twice does not want to wait.
                _ = interrupt.recv() => {
                    engine.drain(Instant::now());
                    tokio::time::timeout(LAST_STEP_TIMEOUT, ended(&engine)).await
                }
            };
            match end {
                Ok(Health::Failed { message }) => Err(ServerError::EngineFailed { message }),
                Ok(_) => Ok(()),
                Err(_) => Err(ServerError::EngineStuck),
            }
        }
    };
    // Clients that read slowly do not keep the server.
    if tokio::time::timeout(FLUSH_TIMEOUT, server).await.is_err() {
        tracing::warn!("some clients have not read their answers to the end");
    }
    result
}

/// Waits until the engine has failed.
async fn failure(engine: &EngineHandle) -> String {
    loop {
        if let Health::Failed { message } = engine.health() {
            return message;
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}

/// Waits until the engine has ended, in order or not.
async fn ended(engine: &EngineHandle) -> Health {
    loop {
        match engine.health() {
            Health::Ready | Health::Draining => tokio::time::sleep(HEALTH_INTERVAL).await,
            ended => return ended,
        }
    }
}

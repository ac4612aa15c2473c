//! From bound sockets to a stopped server: accept, and on a signal finish what was accepted.

mod answers;
mod connections;
mod tls;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nibble_engine::{EngineHandle, Health};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::app::Service;
use crate::auth::ApiKeys;
pub use connections::{ConnectionLimits, Socket};
pub use tls::{Tls, TlsError};

/// How often the engine's health is looked at.
const HEALTH_INTERVAL: Duration = Duration::from_millis(200);
/// Time that the step in flight has at the drain deadline.
const LAST_STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Time that responses have to reach their clients after the engine has stopped.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// The same for the admin address, after that.
const ADMIN_FLUSH_TIMEOUT: Duration = Duration::from_millis(200);

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
    /// The engine did not end when it was told to.
    #[error("the engine did not end its last step; its thread is left behind")]
    EngineStuck,
    /// The engine hangs in a step.
    #[error("the engine has not finished a step for {seconds} seconds; the process ends, to be started anew")]
    EngineHangs {
        /// How long.
        seconds: u64,
    },
}

/// The addresses of a server.
#[derive(Debug)]
pub struct Sockets {
    /// Of the API.
    pub api: Socket,
    /// Of what changes the server's state or tells of its insides.
    pub admin: Option<Socket>,
}

/// When a server gives up waiting, and what its connections may take.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Time to finish what was accepted when the server is told to stop.
    pub drain_timeout: Duration,
    /// Time without a finished step, while there is work, after which the server ends with an error.
    pub stuck_timeout: Duration,
    /// Limits of connections, of each address alone.
    pub connections: ConnectionLimits,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            drain_timeout: Duration::from_secs(30),
            stuck_timeout: Duration::from_secs(300),
            connections: ConnectionLimits::default(),
        }
    }
}

/// Why the server begins to stop.
enum Cause {
    Told,
    EngineFailed { message: String },
    EngineHangs { seconds: u64 },
}

impl Service {
    /// Serves until SIGTERM, SIGINT or `POST /admin/drain`, then accepts no more, lets the engine finish what it
    /// accepted within the drain timeout, and returns. Also returns when the engine dies or hangs, so that a
    /// supervisor starts the process anew. SIGHUP reads the files of keys and certificates again.
    ///
    /// # Errors
    /// When the signals or the engine fail.
    pub async fn serve(self, sockets: Sockets, options: ServeOptions) -> Result<(), ServerError> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let hangup = signal(SignalKind::hangup())?;
        let engine = self.engine();
        let Sockets { api, admin } = sockets;
        let certificates = [api.tls.clone(), admin.as_ref().and_then(|socket| socket.tls.clone())];
        let reloading = tokio::spawn(reload(hangup, Arc::clone(&self.options().api_keys), certificates));
        let (stop_api, api_stopped) = watch::channel(false);
        let (stop_admin, admin_stopped) = watch::channel(false);
        let limits = options.connections;
        let api = tokio::spawn(connections::accept(api, self.router(), limits, api_stopped));
        let admin = admin.map(|socket| {
            tokio::spawn(connections::accept(socket, self.admin_router(), limits, admin_stopped))
        });
        let cause = tokio::select! {
            _ = terminate.recv() => Cause::Told,
            _ = interrupt.recv() => Cause::Told,
            () = self.drain_requested() => Cause::Told,
            message = failure(engine) => Cause::EngineFailed { message },
            seconds = hanging(engine, options.stuck_timeout) => Cause::EngineHangs { seconds },
        };
        stop_api.send_replace(true);
        let result = match cause {
            Cause::EngineFailed { message } => Err(ServerError::EngineFailed { message }),
            Cause::EngineHangs { seconds } => {
                let error = ServerError::EngineHangs { seconds };
                tracing::error!(%error, "giving up");
                self.give_up_requests(&error.to_string());
                Err(error)
            }
            Cause::Told => {
                let drain_timeout = options.drain_timeout;
                tracing::info!(
                    seconds = drain_timeout.as_secs(),
                    "told to stop: finishing what was accepted"
                );
                drain(engine, drain_timeout, &mut interrupt).await
            }
        };
        // Clients that read slowly do not keep the server.
        if tokio::time::timeout(FLUSH_TIMEOUT, api).await.is_err() {
            tracing::warn!("some clients have not read their answers to the end");
        }
        stop_admin.send_replace(true);
        if let Some(admin) = admin {
            // What is left there is a client that holds its connection.
            let _ = tokio::time::timeout(ADMIN_FLUSH_TIMEOUT, admin).await;
        }
        reloading.abort();
        if let Some(traces) = self.options().traces.clone() {
            // A thread that panicked has said so.
            let _ = tokio::task::spawn_blocking(move || traces.shut_down()).await;
        }
        result
    }
}

/// Lets the engine finish what it accepted, or end it at the deadline.
async fn drain(
    engine: &EngineHandle,
    drain_timeout: Duration,
    interrupt: &mut Signal,
) -> Result<(), ServerError> {
    engine.drain(Instant::now() + drain_timeout);
    let end = tokio::select! {
        end = tokio::time::timeout(drain_timeout + LAST_STEP_TIMEOUT, ended(engine)) => end,
        // Whoever asks twice does not want to wait.
        _ = interrupt.recv() => {
            engine.drain(Instant::now());
            tokio::time::timeout(LAST_STEP_TIMEOUT, ended(engine)).await
        }
    };
    match end {
        Ok(Health::Failed { message }) => Err(ServerError::EngineFailed { message }),
        Ok(_) => Ok(()),
        Err(_) => Err(ServerError::EngineStuck),
    }
}

/// Waits for the message to stop. A sender that is gone means the same.
async fn told(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// At each SIGHUP, reads keys and certificates again. What cannot be read stays as it was.
async fn reload(mut hangup: Signal, keys: Arc<ApiKeys>, certificates: [Option<Arc<Tls>>; 2]) {
    while hangup.recv().await.is_some() {
        match keys.reload() {
            Ok(count) => tracing::info!(count, "the API keys were read again"),
            Err(error) => tracing::error!(%error, "the API keys stay as they were"),
        }
        for tls in certificates.iter().flatten() {
            match tls.reload() {
                Ok(()) => tracing::info!("the TLS certificate was read again"),
                Err(error) => tracing::error!(%error, "the TLS certificate stays as it was"),
            }
        }
    }
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

/// Waits until the engine has work and has not finished a step for `timeout`; returns how many seconds it is.
async fn hanging(engine: &EngineHandle, timeout: Duration) -> u64 {
    loop {
        if let Some(age) = engine.last_step_age().filter(|&age| age >= timeout) {
            return age.as_secs();
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

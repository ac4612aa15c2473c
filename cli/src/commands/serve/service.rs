//! What `nibble serve` is told about its addresses, and who may use them.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use nibble_server::{ApiKeys, ConnectionLimits, ServeOptions, ServerOptions, Socket, Sockets, Tls, Traces};

/// Arguments of the HTTP service.
#[derive(Debug, Args)]
#[command(next_help_heading = "Service")]
pub(super) struct ServiceArguments {
    /// Address to listen on; 0.0.0.0 for all of this machine's.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Demand this key of every request but health checks; may be given several times.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// Keys from a file, one on each line, as KEY or NAME:KEY; read again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Address for POST /admin/drain, metrics and health; keys are needed unless it is of this machine alone.
    #[arg(long, value_name = "HOST:PORT")]
    admin_address: Option<String>,
    /// Report metrics at the admin address alone.
    #[arg(long, requires = "admin_address")]
    metrics_on_admin_only: bool,
    /// Speak HTTPS with this certificate, a PEM file with the chain; read again on SIGHUP.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// The private key of the certificate, a PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// Most connections at once; more wait.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_connections: u32,
    /// On SIGTERM: seconds to finish what was accepted.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
    /// End with an error when no step was finished for so many seconds although there is work.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    stuck_timeout: u64,
    /// Export a span for each request to this OpenTelemetry collector (OTLP over HTTP), such as
    /// http://localhost:4318.
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// Report metrics under vLLM's names as well, those that it has retired included.
    #[arg(long)]
    vllm_metrics: bool,
    /// Ignore the unknown and unsupported fields of requests instead of refusing them; the answer's header
    /// x-nibble-ignored-fields names them.
    #[arg(long)]
    ignore_unknown_fields: bool,
}

/// Addresses that are bound, and the files that were read for them.
pub(super) struct Bound {
    api: TcpListener,
    admin: Option<TcpListener>,
    tls: Option<Arc<Tls>>,
    traces: Option<Arc<Traces>>,
    api_keys: Arc<ApiKeys>,
    admin_is_local: bool,
}

impl ServiceArguments {
    /// Binds the addresses and reads the files: what cannot work is known before the model is loaded.
    pub(super) fn bind(&self) -> anyhow::Result<Bound> {
        let api = listen((self.host.as_str(), self.port), &format!("{}:{}", self.host, self.port))?;
        let admin = self.admin_address.as_deref().map(|address| listen(address, address)).transpose()?;
        let api_keys = Arc::new(ApiKeys::new(&self.api_key, self.api_key_file.as_deref())?);
        let admin_address = admin.as_ref().map(TcpListener::local_addr).transpose()?;
        let admin_is_local = admin_address.is_none_or(|address| address.ip().is_loopback());
        if !admin_is_local && api_keys.is_empty() {
            bail!(
                "--admin-address {} can be reached from other machines, expected one of 127.0.0.1 or keys; \
                 give --api-key-file or --api-key",
                self.admin_address.as_deref().unwrap_or_default()
            );
        }
        let tls = match (&self.tls_certificate, &self.tls_key) {
            (Some(certificate), Some(key)) => Some(Arc::new(Tls::open(certificate, key)?)),
            _ => None,
        };
        let traces = self.otlp_endpoint.as_deref().map(Traces::export_to).transpose()?.map(Arc::new);
        Ok(Bound { api, admin, tls, traces, api_keys, admin_is_local })
    }

    /// How the service behaves at `bound`.
    pub(super) fn server_options(&self, bound: &Bound) -> ServerOptions {
        let default = ServerOptions::default();
        ServerOptions {
            api_keys: Arc::clone(&bound.api_keys),
            admin_needs_key: !bound.admin_is_local,
            metrics_on_admin_only: self.metrics_on_admin_only,
            stuck_after: default.stuck_after.min(self.stuck_timeout()),
            traces: bound.traces.clone(),
            vllm_metrics: self.vllm_metrics,
            ignore_unknown_fields: self.ignore_unknown_fields,
            ..default
        }
    }

    /// When the server gives up waiting.
    pub(super) fn serve_options(&self) -> ServeOptions {
        ServeOptions {
            drain_timeout: Duration::from_secs(self.drain_timeout),
            stuck_timeout: self.stuck_timeout(),
            connections: ConnectionLimits {
                connections: self.max_connections as usize,
                ..ConnectionLimits::default()
            },
        }
    }

    fn stuck_timeout(&self) -> Duration {
        Duration::from_secs(self.stuck_timeout)
    }
}

impl Bound {
    /// Where the API is served.
    pub(super) fn url(&self) -> anyhow::Result<String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}", self.api.local_addr()?))
    }

    /// Where the admin is served, if anywhere.
    pub(super) fn admin_address(&self) -> anyhow::Result<Option<SocketAddr>> {
        Ok(self.admin.as_ref().map(TcpListener::local_addr).transpose()?)
    }

    /// The sockets, within a runtime. The admin's on this machine alone is not encrypted: no certificate is for it.
    pub(super) fn sockets(self) -> anyhow::Result<Sockets> {
        let admin_tls = self.tls.clone().filter(|_| !self.admin_is_local);
        let admin = self.admin.map(|listener| socket(listener, admin_tls)).transpose()?;
        Ok(Sockets { api: socket(self.api, self.tls)?, admin })
    }
}

fn listen(address: impl ToSocketAddrs, named: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("cannot listen on {named}"))
}

fn socket(listener: TcpListener, tls: Option<Arc<Tls>>) -> anyhow::Result<Socket> {
    listener.set_nonblocking(true)?;
    Ok(Socket { listener: tokio::net::TcpListener::from_std(listener)?, tls })
}

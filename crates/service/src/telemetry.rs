//! Writes the service's own log: to standard error, for people or as JSON lines.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;
use tracing_subscriber::prelude::*;

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    #[default]
    Human,
    Json,
}

/// Starts the log, once. `filter` is as in tracing's `EnvFilter` (`info,sealci=debug`); a bad one is taken as `info`.
pub fn start(format: Format, filter: &str, colours: bool) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        Format::Human => registry
            .with(fmt::layer().with_writer(std::io::stderr).with_ansi(colours).with_target(false))
            .try_init(),
        Format::Json => registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init(),
    };
    if started.is_err() {
        tracing::debug!("the log was started before");
    }
}

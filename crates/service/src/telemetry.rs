//! Sets up where a process's own log goes: to stderr, as lines for people or as JSON for machines.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    #[default]
    Human,
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("SEALCI_LOG is no log filter (try `info`, or `info,sealci_agent=debug`)")]
    Filter(#[from] ParseError),
    #[error("logging is set up already")]
    Twice,
}

/// Sends this process's log to stderr. The environment variable `SEALCI_LOG` says what is logged; without it, `info` and
/// above.
pub fn init(format: Format) -> Result<(), TelemetryError> {
    init_with_default(format, "info")
}

/// As [`init`], with another filter where `SEALCI_LOG` says nothing.
pub fn init_with_default(format: Format, default: &str) -> Result<(), TelemetryError> {
    let filter = match std::env::var("SEALCI_LOG") {
        Ok(filter) if !filter.trim().is_empty() => EnvFilter::try_new(filter)?,
        _ => EnvFilter::try_new(default)?,
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colors = !no_color && std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colors);
    let set = match format {
        Format::Human => builder.try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    set.map_err(|_| TelemetryError::Twice)
}

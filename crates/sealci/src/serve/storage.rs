//! The flags about what is kept of actions.

use std::time::Duration;

use clap::Args;
use sealci_controller::storage::StorageConfig;
use sealci_controller::storage::objects::{ObjectsConfig, ObjectsLocation};

use crate::data_folder::DataFolder;
use crate::exit::{Exit, Failure};

/// What is kept of actions: where, how much of it, and how long.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "What is kept of actions")]
pub struct StorageArgs {
    /// A folder, or s3://BUCKET/PREFIX with the usual AWS_* variables [default: `objects` in the data folder]
    #[arg(long, value_name = "PLACE", env = "SEALCI_OBJECTS")]
    pub objects: Option<String>,
    /// What one action may keep at once, packed: 500MiB, 16GiB
    #[arg(long, value_name = "BYTES", default_value = "16GiB", value_parser = size)]
    pub max_upload: u64,
    /// How long artifacts are kept whose manifest does not say: 12h, 30d
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = age)]
    pub keep_artifacts: Duration,
    /// How long caches are kept that nothing uses
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = age)]
    pub keep_caches: Duration,
    /// All caches together; what was not used for longest goes first
    #[arg(long, value_name = "BYTES", default_value = "20GiB", value_parser = size)]
    pub cache_budget: u64,
    /// How long logs are kept after their action's end
    #[arg(long, value_name = "TIME", default_value = "90d", value_parser = age)]
    pub keep_logs: Duration,
    /// All logs of ended actions together, packed; the oldest go first
    #[arg(long, value_name = "BYTES", default_value = "10GiB", value_parser = size)]
    pub logs_budget: u64,
    /// How long the logs of ended actions stay in the database
    #[arg(long, value_name = "MILLISECONDS", default_value = "30000", hide = true)]
    pub move_logs_after_ms: u64,
}

impl StorageArgs {
    /// The configuration; `agents_url` is where agents reach the controller, if that is known.
    pub fn config(&self, folder: &DataFolder, agents_url: Option<String>) -> Result<StorageConfig, Failure> {
        let location = match &self.objects {
            Some(text) => {
                text.parse().map_err(|error| Failure::of_error(Exit::Usage, "--objects", &error))?
            }
            None => ObjectsLocation::Folder(folder.path("objects")),
        };
        let aws = std::env::vars().filter(|(name, _)| name.starts_with("AWS_")).collect();
        let mut config = StorageConfig::new(ObjectsConfig { location, aws });
        config.agents_url = agents_url.map(|url| url.trim_end_matches('/').to_owned());
        config.max_upload_bytes = self.max_upload;
        config.keep_artifacts = self.keep_artifacts;
        config.keep_caches = self.keep_caches;
        config.cache_budget_bytes = self.cache_budget;
        config.keep_logs = self.keep_logs;
        config.logs_budget_bytes = self.logs_budget;
        config.move_logs_after = Duration::from_millis(self.move_logs_after_ms);
        Ok(config)
    }
}

/// Reads `500MiB`, `16GiB`, or plain bytes.
fn size(text: &str) -> Result<u64, String> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40), ("", 1)];
    scaled(text, &units).ok_or_else(|| "write it as 500MiB, 16GiB or 1TiB, or in bytes".to_owned())
}

/// Reads `30m`, `12h`, `30d`.
fn age(text: &str) -> Result<Duration, String> {
    let seconds = scaled(text, &[("m", 60), ("h", 3600), ("d", 86_400)]);
    // A longer one could not be written as a time.
    let seconds = seconds.filter(|seconds| *seconds <= 36_500 * 86_400);
    seconds.map(Duration::from_secs).ok_or_else(|| "write it as 30m, 12h or 30d".to_owned())
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_have_units() {
        assert_eq!(size("20GiB"), Ok(20 << 30));
        assert_eq!(size("17"), Ok(17));
        assert_eq!(age("30d"), Ok(Duration::from_secs(30 * 86_400)));
        for bad in ["", "GiB", "1.5GiB", "20GB", "-1", "99999999999999999999", "18446744073709551615GiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        for bad in ["", "30", "d", "30 d", "1d12h", "9999999d"] {
            assert!(age(bad).is_err(), "{bad}");
        }
    }
}

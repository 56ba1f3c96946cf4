//! Says what the agent has to give, and whether it takes anything on.

use std::collections::HashMap;
use std::path::PathBuf;

use sealci_core::plan::Resources;
use sealci_proto::agent;

/// What stays the same while the agent runs.
#[derive(Debug, Clone)]
pub struct Offering {
    pub capacity: Resources,
    pub labels: HashMap<String, String>,
    /// The first is the default.
    pub executors: Vec<String>,
    pub slots: u32,
}

impl Offering {
    /// Adds what every agent says of its machine, unless the configuration says otherwise.
    pub fn new(
        capacity: Resources,
        labels: impl IntoIterator<Item = (String, String)>,
        executors: Vec<String>,
        slots: u32,
    ) -> Self {
        let mut all: HashMap<_, _> = machine_labels().into_iter().collect();
        all.extend(labels);
        Self { capacity, labels: all, executors, slots }
    }

    /// The message; `refusal` is why nothing new is taken.
    pub fn offer(&self, refusal: Option<&str>) -> agent::Offer {
        agent::Offer {
            capacity: Some(self.capacity.into()),
            labels: self.labels.clone(),
            executors: self.executors.clone(),
            accepting: refusal.is_none(),
            not_accepting_because: refusal.unwrap_or_default().to_owned(),
            slots: self.slots,
        }
    }
}

/// The labels that every agent on this machine has.
pub fn machine_labels() -> [(String, String); 2] {
    [("arch", std::env::consts::ARCH), ("os", std::env::consts::OS)]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
}

/// Watches over the disk on which actions work.
pub struct Disk {
    folder: PathBuf,
    min_free_bytes: u64,
    probe: DiskProbe,
    refusal: Option<String>,
}

/// Says how many bytes are free on a folder's disk.
pub type DiskProbe = Box<dyn Fn(&std::path::Path) -> std::io::Result<u64> + Send + Sync>;

impl Disk {
    pub fn new(folder: PathBuf, min_free_bytes: u64, probe: DiskProbe) -> Self {
        let mut disk = Self { folder, min_free_bytes, probe, refusal: None };
        disk.look();
        disk
    }

    /// Looks how much is free now.
    pub fn look(&mut self) {
        let refusal = match (self.probe)(&self.folder) {
            Ok(free) if free < self.min_free_bytes => {
                Some(format!("disk below {}", human(self.min_free_bytes)))
            }
            Ok(_) => None,
            Err(error) => Some(format!("disk cannot be looked at: {error}")),
        };
        if refusal != self.refusal {
            match &refusal {
                Some(reason) => {
                    tracing::warn!(reason, folder = %self.folder.display(), "no new attempts are taken")
                }
                None => tracing::info!("there is room on the disk again"),
            }
            self.refusal = refusal;
        }
    }

    /// Why nothing new fits.
    pub fn refusal(&self) -> Option<String> {
        self.refusal.clone()
    }
}

/// A size for people: the largest unit that divides it.
pub fn human(bytes: u64) -> String {
    match bytes {
        bytes if bytes > 0 && bytes % (1 << 30) == 0 => format!("{} GiB", bytes >> 30),
        bytes if bytes > 0 && bytes % (1 << 20) == 0 => format!("{} MiB", bytes >> 20),
        bytes => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn a_full_disk_is_told_and_an_emptied_one_forgotten() {
        let free = Arc::new(AtomicU64::new(10));
        let probe = free.clone();
        let mut disk = Disk::new("/x".into(), 1 << 30, Box::new(move |_| Ok(probe.load(Ordering::Relaxed))));
        assert_eq!(disk.refusal().as_deref(), Some("disk below 1 GiB"));
        free.store(1 << 30, Ordering::Relaxed);
        disk.look();
        assert_eq!(disk.refusal(), None);
    }

    #[test]
    fn an_offer_names_the_machine_and_the_configuration_wins() {
        let labels = [("os".to_owned(), "plan9".to_owned()), ("gpu".to_owned(), "yes".to_owned())];
        let offering = Offering::new(Resources::DEFAULT, labels, vec!["fake".into()], 4);
        let offer = offering.offer(Some("draining"));
        assert_eq!(offer.labels["os"], "plan9");
        assert_eq!(offer.labels["arch"], std::env::consts::ARCH);
        assert!(!offer.accepting && offer.not_accepting_because == "draining");
        assert!(offering.offer(None).accepting);
    }
}

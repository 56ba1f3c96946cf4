//! Writes down what happened, in names that are the same each time a seed is played.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use sealci_core::ids::{ActionId, AttemptId, PipelineId};

/// The steps of one run.
#[derive(Debug)]
pub struct Trace {
    lines: Vec<String>,
    hasher: DefaultHasher,
    is_printed: bool,
    actions: BTreeMap<ActionId, usize>,
    pipelines: BTreeMap<PipelineId, usize>,
}

impl Trace {
    /// `is_printed`: each step is printed at once.
    pub fn new(is_printed: bool) -> Self {
        Self {
            lines: Vec::new(),
            hasher: DefaultHasher::new(),
            is_printed,
            actions: BTreeMap::new(),
            pipelines: BTreeMap::new(),
        }
    }

    pub fn add(&mut self, now: Duration, step: &str) {
        let line = format!("{:>9.3} {step}", now.as_secs_f64());
        line.hash(&mut self.hasher);
        if self.is_printed {
            println!("{line}");
        }
        self.lines.push(line);
    }

    /// An attempt's name: its action by the order of appearance, and its number.
    pub fn attempt(&mut self, id: AttemptId) -> String {
        let next = self.actions.len() + 1;
        let action = *self.actions.entry(id.action).or_insert(next);
        format!("{action}.{}", id.number)
    }

    /// A pipeline's name: by the order of appearance.
    pub fn pipeline(&mut self, id: PipelineId) -> String {
        let next = self.pipelines.len() + 1;
        format!("p{}", self.pipelines.entry(id).or_insert(next))
    }

    /// The last steps.
    pub fn last(&self, count: usize) -> &[String] {
        &self.lines[self.lines.len().saturating_sub(count)..]
    }

    /// The same for two runs only if they took the same steps.
    pub fn fingerprint(&self) -> u64 {
        self.hasher.finish()
    }

    pub fn steps(&self) -> usize {
        self.lines.len()
    }
}

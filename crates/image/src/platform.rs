//! Chooses, of an image made for many machines, the one for this.

use std::fmt;

use serde::{Deserialize, Serialize};

/// As an image index and an image configuration name it (image-spec, image-index.md; names are Go's).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    pub fn this_machine() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "x86" => ("386", None),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// How well what is made for `other` runs here; none if not at all. More is better.
    pub fn fitness(&self, other: &Self) -> Option<u32> {
        if self.os != other.os || self.architecture != other.architecture {
            return None;
        }
        match (self.level(), other.level()) {
            (own, Some(level)) if level <= own.unwrap_or_else(|| self.least_level()) => Some(10 + level),
            (_, Some(_)) => None,
            (_, None) => Some(1),
        }
    }

    /// `v3` is 3. None where none is said, or none that is understood.
    fn level(&self) -> Option<u32> {
        self.variant.as_deref()?.strip_prefix('v')?.parse().ok()
    }

    /// What every machine of this architecture can run.
    fn least_level(&self) -> u32 {
        match self.architecture.as_str() {
            "arm64" => 8,
            "arm" => 6,
            _ => 1,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |text: &str| -> String {
            let plain = text.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
            let plain: String = plain.take(30).collect();
            if plain.is_empty() { "?".to_owned() } else { plain }
        };
        write!(formatter, "{}/{}", name(&self.os), name(&self.architecture))?;
        match &self.variant {
            Some(variant) => write!(formatter, "/{}", name(variant)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        let (os, architecture) = (parts.next().unwrap(), parts.next().unwrap());
        Platform { os, architecture, variant: parts.next() }
    }

    #[test]
    fn the_nearest_that_runs_is_best() {
        for (own, offers, best) in [
            ("linux/amd64", &["linux/arm64", "linux/amd64"][..], Some("linux/amd64")),
            ("linux/amd64", &["linux/amd64/v3", "linux/amd64"], Some("linux/amd64")),
            ("linux/amd64", &["linux/amd64/v3"], None),
            ("linux/arm64/v8", &["linux/arm64", "linux/arm64/v8", "linux/arm64/v9"], Some("linux/arm64/v8")),
            ("linux/arm/v7", &["linux/arm/v5", "linux/arm/v6", "linux/arm/v8"], Some("linux/arm/v6")),
            ("linux/amd64", &["windows/amd64", "unknown/unknown"], None),
        ] {
            let own = platform(own);
            let found = offers
                .iter()
                .filter_map(|offer| Some((own.fitness(&platform(offer))?, offer)))
                .max_by_key(|(fitness, _)| *fitness)
                .map(|(_, offer)| *offer);
            assert_eq!(found, best, "{own}");
        }
        assert!(Platform::this_machine().fitness(&Platform::this_machine()).is_some());
    }
}

//! Cache salts of consumers: a prompt finds the KV blocks of its own consumer's earlier prompts, and nobody else's.
//!
//! A prompt whose beginning is cached is answered sooner. Where consumers share a cache, one can find out by that what
//! another has asked. Blocks are shared only under an equal salt, so each consumer gets one that no other can have or
//! guess: an HMAC-SHA256 of its name and the request's own salt, under a secret.

use forebay_config::Environment;
use forebay_types::{ConsumerName, hex};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::config::SaltScope;
use crate::{GatewayBuildError, GatewayConfig};

/// 128 bits of anything random, written in any way, are longer.
const SECRET_BYTES_MIN: usize = 16;
/// So that the same secret may be a key for something else.
const PURPOSE: &[u8] = b"forebay consumer cache salt 1\0";

/// Derives the salts of all consumers.
pub(crate) struct Salts {
    /// With secret and purpose in it.
    mac: Hmac<Sha256>,
}

impl Salts {
    /// `None` where the configuration shares the cache.
    pub(crate) fn new(
        config: &GatewayConfig,
        env: &dyn Environment,
    ) -> Result<Option<Self>, GatewayBuildError> {
        match (config.cache_salt, &config.cache_salt_secret) {
            (SaltScope::None, None) => Ok(None),
            (SaltScope::None, Some(_)) => Err(GatewayBuildError::SaltSecretUnused),
            (SaltScope::Consumer, None) => {
                let mut random = [0u8; 32];
                getrandom::fill(&mut random).map_err(GatewayBuildError::Random)?;
                Ok(Some(Self::keyed(&random)))
            }
            (SaltScope::Consumer, Some(secret)) => {
                let at = || "gateway.cache-salt-secret".to_owned();
                let secret =
                    secret.resolve(env).map_err(|source| GatewayBuildError::Secret { at: at(), source })?;
                let secret = secret.expose().as_bytes();
                if secret.len() < SECRET_BYTES_MIN {
                    return Err(GatewayBuildError::SaltSecretShort { at: at(), least: SECRET_BYTES_MIN });
                }
                Ok(Some(Self::keyed(secret)))
            }
        }
    }

    fn keyed(secret: &[u8]) -> Self {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes a key of any length");
        mac.update(PURPOSE);
        Self { mac }
    }

    /// The salt of a consumer's request, 64 hex digits; `own` is the salt that the request has itself.
    pub(crate) fn of(&self, consumer: &ConsumerName, own: Option<&str>) -> String {
        let mut mac = self.mac.clone();
        // The length keeps the name's end and the own salt's beginning apart; an own salt is never empty.
        let name = consumer.as_str().as_bytes();
        mac.update(&(name.len() as u64).to_le_bytes());
        mac.update(name);
        mac.update(own.unwrap_or_default().as_bytes());
        hex(&mac.finalize().into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Fixed for ever: several gateways, of several versions, stand in front of the same workers.
    #[test]
    fn salts_are_hmacs_of_name_and_own_salt() {
        let salts = Salts::keyed(b"0123456789abcdef");
        let check = |consumer: &str, own, expect: &str| assert_eq!(salts.of(&consumer.into(), own), expect);
        check("team-a", None, "c503b6cec976b6fca3adf8a8564ee2344f4497794c7fde6131bc8e06d5541dad");
        check("team-a", Some("s"), "7ef7e4086733a5a6c8a982313ccf2b84c2bcae892a5c4e6e8ffa13adb05e4e62");
        check("team-b", None, "264a0299166be6b62d254a0c504739ac806f503fe33ec43a6b5aa2fce11de91a");
    }

    proptest! {
        /// Equal salts only for the same consumer with the same own salt, however the texts are cut.
        #[test]
        fn no_two_share_a_salt(a in "[ab]{1,4}", own_a in "[ab]{1,4}", b in "[ab]{1,4}", own_b in "[ab]{1,4}") {
            let salts = Salts::keyed(b"0123456789abcdef");
            let (name_a, name_b) = (ConsumerName::from(a.as_str()), ConsumerName::from(b.as_str()));
            for (x, y) in [(Some(&own_a), Some(&own_b)), (None, None), (Some(&own_a), None), (None, Some(&own_b))] {
                let (x, y) = (x.map(String::as_str), y.map(String::as_str));
                prop_assert_eq!(salts.of(&name_a, x) == salts.of(&name_b, y), a == b && x == y);
            }
            // Who does not know the secret can't make another's salt by sending it as the own one.
            prop_assert_eq!(salts.of(&name_b, Some(&salts.of(&name_a, None))) == salts.of(&name_a, None), false);
            prop_assert_ne!(Salts::keyed(b"another secret of ours").of(&name_a, None), salts.of(&name_a, None));
        }
    }
}

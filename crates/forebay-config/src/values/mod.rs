//! Values a person writes: durations, sizes, addresses, secrets, "one or a list".
//!
//! Each parses from the text in the file, prints back what it would parse, and describes itself in the schema
//! by a `format` that the diagnostics and the reference page know. None of them knows where it stands in a file.

mod byte_size;
mod human_duration;
mod listen_addr;
mod one_or_many;
mod secret;

pub use byte_size::{ByteSize, ParseByteSizeError};
pub use human_duration::{HumanDuration, ParseHumanDurationError};
pub use listen_addr::{ListenAddr, ParseListenAddrError};
pub(crate) use one_or_many::ONE_OR_MANY;
pub use one_or_many::OneOrMany;
pub use secret::{ParseSecretError, Secret, SecretError, SecretValue};

/// `Deserialize`, `Serialize` and `JsonSchema` of a value that is written as text and parses by `FromStr`.
///
/// A bare number or boolean reaches `FromStr` as text, so that its error can say what to write instead.
macro_rules! written_as_text {
    ($type:ty, $name:literal, $format:literal, $expecting:literal, $example:literal) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;

                impl serde::de::Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Self::Value, E> {
                        self.visit_str(&number.to_string())
                    }

                    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Self::Value, E> {
                        self.visit_str(&number.to_string())
                    }

                    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Self::Value, E> {
                        self.visit_str(&number.to_string())
                    }
                }

                deserializer.deserialize_str(Text)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({"type": "string", "format": $format, "examples": [$example]})
            }
        }
    };
}
pub(crate) use written_as_text;

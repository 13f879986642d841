//! Where rules come from: the node's options, and a config file with sections of the same keys.
//!
//! ```text
//! # comment
//! [inject-error]
//! event = "l2_update"
//! errno = "28"
//! ```

use super::rules::{Action, Inject, Rule};
use crate::options::blockdev::{
    BlkdebugEvent, BlkdebugIOType, BlkdebugInjectErrorOptions, BlkdebugSetStateOptions,
};
use crate::options::value::parse_signed;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::error::{Errno, Error};

/// Bytes of a sector, in which places are given.
const SECTOR: u64 = 512;

/// The rules of a node, as text and as options.
#[derive(Default)]
pub(super) struct Sections {
    errors: Vec<BlkdebugInjectErrorOptions>,
    states: Vec<BlkdebugSetStateOptions>,
}

impl Sections {
    /// Adds what options give.
    pub(super) fn add(&mut self, errors: &[BlkdebugInjectErrorOptions], states: &[BlkdebugSetStateOptions]) {
        self.errors.extend_from_slice(errors);
        self.states.extend_from_slice(states);
    }

    /// Adds what a config file says.
    pub(super) fn parse(&mut self, text: &str) -> Result<(), Error> {
        let mut section: Option<Section> = None;
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(group) = line.strip_prefix('[') {
                let name = group.trim_end_matches(']').split_whitespace().next().unwrap_or_default();
                self.end(section.replace(Section::new(name)?))?;
                continue;
            }
            let (key, value) = pair(line).ok_or_else(|| {
                Error::invalid(format!("Line {number} of the blkdebug config file: expected key = \"value\""))
            })?;
            section.as_mut().ok_or_else(|| Error::invalid("no group defined"))?.set(key, value)?;
        }
        self.end(section)
    }

    fn end(&mut self, section: Option<Section>) -> Result<(), Error> {
        let Some(s) = section else { return Ok(()) };
        let event = s.event.ok_or_else(|| Error::invalid("Missing event name for rule"))?;
        let Fields { state, iotype, errno, sector, once, immediately, new_state } = s.fields;
        if s.error {
            let rule = BlkdebugInjectErrorOptions { event, state, iotype, errno, sector, once, immediately };
            self.errors.push(rule);
        } else {
            self.states.push(BlkdebugSetStateOptions { event, state, new_state: new_state.unwrap_or(0) });
        }
        Ok(())
    }

    /// The rules: errors first, then states.
    pub(super) fn rules(self) -> Result<Vec<Rule>, Error> {
        let errors = self.errors.iter().map(inject);
        errors.chain(self.states.iter().map(set_state)).collect()
    }
}

/// A section of a config file.
struct Section {
    /// `[inject-error]`, or else `[set-state]`.
    error: bool,
    event: Option<BlkdebugEvent>,
    fields: Fields,
}

#[derive(Default)]
struct Fields {
    state: Option<i64>,
    iotype: Option<BlkdebugIOType>,
    errno: Option<i64>,
    sector: Option<i64>,
    once: Option<bool>,
    immediately: Option<bool>,
    new_state: Option<i64>,
}

impl Section {
    fn new(name: &str) -> Result<Section, Error> {
        let error = match name {
            "inject-error" => true,
            "set-state" => false,
            other => return Err(Error::invalid(format!("There is no option group '{other}'"))),
        };
        Ok(Section { error, event: None, fields: Fields::default() })
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Error> {
        let bad = || Error::invalid(format!("invalid parameter value: {value}"));
        let f = &mut self.fields;
        match (key, self.error) {
            ("event", _) => self.event = Some(BlkdebugEvent::from_word(value).ok_or_else(bad)?),
            ("state", _) => f.state = Some(number(key, value)?),
            ("iotype", true) => f.iotype = Some(BlkdebugIOType::from_word(value).ok_or_else(bad)?),
            ("errno", true) => f.errno = Some(number(key, value)?),
            ("sector", true) => f.sector = Some(number(key, value)?),
            ("once", true) => f.once = Some(switch(key, value)?),
            ("immediately", true) => f.immediately = Some(switch(key, value)?),
            ("new_state", false) => f.new_state = Some(number(key, value)?),
            _ => return Err(Error::invalid(format!("Invalid parameter '{key}'"))),
        }
        Ok(())
    }
}

/// `key = "value"`.
fn pair(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
    let key = key.trim();
    (!key.is_empty() && !key.contains(char::is_whitespace)).then_some((key, value))
}

fn number(key: &str, text: &str) -> Result<i64, Error> {
    parse_signed(text).ok_or_else(|| Error::invalid(format!("Parameter '{key}' expects a number")))
}

fn switch(key: &str, text: &str) -> Result<bool, Error> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Error::invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

fn event(of: BlkdebugEvent) -> DebugEvent {
    // the two lists have the same names (tested)
    DebugEvent::from_word(of.as_str()).unwrap_or(DebugEvent::None)
}

fn inject(o: &BlkdebugInjectErrorOptions) -> Result<Rule, Error> {
    let errno = o.errno.unwrap_or(i64::from(Errno::EIO.0));
    let errno = i32::try_from(errno).ok().filter(|e| (0..4096).contains(e));
    let errno = errno
        .ok_or_else(|| Error::invalid("Parameter 'errno' expects an error number between 0 and 4095"))?;
    let offset = match o.sector {
        None | Some(-1) => None,
        Some(s) => {
            let place = u64::try_from(s).ok().and_then(|s| s.checked_mul(SECTOR));
            Some(place.ok_or_else(|| Error::invalid("Parameter 'sector' expects a sector number"))?)
        }
    };
    let iotypes = match o.iotype {
        None => Inject::ALL_BUT_STATUS,
        Some(one) => Inject::bit(one),
    };
    let (once, immediately) = (o.once.unwrap_or(false), o.immediately.unwrap_or(false));
    let action = Action::Inject(Inject { errno: Errno(errno), iotypes, offset, once, immediately });
    Ok(Rule { event: event(o.event), state: o.state.unwrap_or(0), action })
}

fn set_state(o: &BlkdebugSetStateOptions) -> Result<Rule, Error> {
    Ok(Rule { event: event(o.event), state: o.state.unwrap_or(0), action: Action::SetState(o.new_state) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<usize, String> {
        let mut sections = Sections::default();
        sections.parse(text).and_then(|()| sections.rules()).map(|r| r.len()).map_err(|e| e.message)
    }

    /// Goal: sections, comments and every key are understood. Method: one of each.
    #[test]
    fn reads_files() {
        let text = "# a comment\n\n[inject-error]\nevent = \"l2_load\"\nstate = \"2\"\niotype = \"read\"\n\
                    errno = \"28\"\nsector = \"7\"\nonce = \"on\"\nimmediately = \"off\"\n[set-state]\n\
                    event=\"none\"\nnew_state = \"3\"\n[inject-error \"name\"]\n  event = \"none\"\n";
        assert_eq!(rules(text), Ok(3));
        assert_eq!(rules(""), Ok(0));
    }

    /// Goal: what is wrong is refused with the texts known from the peer. Method: recorded from it; the last two are
    /// ours, where the peer reads something else than what stands there.
    #[test]
    fn refuses() {
        for (text, want) in [
            ("[inject-error]\nevent = \"nope\"", "invalid parameter value: nope"),
            ("[inject-error]\nerrno = \"7\"", "Missing event name for rule"),
            ("[inject-error]\nevent = \"none\"\nerrno = \"abc\"", "Parameter 'errno' expects a number"),
            ("[inject-error]\nonce = \"maybe\"", "Parameter 'once' expects 'on' or 'off'"),
            ("[inject-error]\nfoo = \"1\"", "Invalid parameter 'foo'"),
            ("[inject-error]\niotype = \"x\"", "invalid parameter value: x"),
            ("[set-state]\nerrno = \"5\"", "Invalid parameter 'errno'"),
            ("[foo]\nevent = \"none\"", "There is no option group 'foo'"),
            ("event = \"none\"", "no group defined"),
            ("[set-state]\nevent = none", "Line 2 of the blkdebug config file: expected key = \"value\""),
            (
                "[inject-error]\nevent = \"none\"\nerrno = \"-5\"",
                "Parameter 'errno' expects an error number between 0 and 4095",
            ),
        ] {
            assert_eq!(rules(text).unwrap_err(), want, "{text}");
        }
    }

    /// Goal: options and engine know the same events. Method: both lists, name by name.
    #[test]
    fn events_are_the_same() {
        for e in DebugEvent::ALL {
            let there = BlkdebugEvent::from_word(e.as_str());
            assert_eq!(there.map(event), Some(*e), "{}", e.as_str());
        }
    }
}

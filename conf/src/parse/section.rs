//! Option sections: `net`, `disk`, `options`, `startup`, `handlers`, `proxy`, and 8.3's `syncer`.

use super::{Parsed, Parser};
use crate::error::{Problem, Shown};
use crate::lexer::{Kind, Token};
use crate::model::{Body, DiskOptions, ProxyOptions, SETTINGS_MAX};
use crate::options::{self, Class, OptionList, OptionSpec, SetOption};

/// Where a `disk { }` is decides what it may hold (spec/drbd-conf.md §8).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskLevel {
    /// Common or resource: `fencing` is allowed and goes to `net`.
    Resource,
    /// Host or volume.
    Volume,
}

/// An option name found in some lists.
struct Found {
    spec: &'static OptionSpec,
    /// Written as `no-NAME`.
    negated: bool,
}

/// The option of the first class that knows `name`; `no-` negates booleans.
fn lookup(classes: &[Class], name: &str) -> Option<Found> {
    let find = |name: &str| classes.iter().find_map(|class| options::find_in(*class, name));
    if let Some(spec) = find(name) {
        return Some(Found { spec, negated: false });
    }
    let spec = find(name.strip_prefix("no-")?)?;
    spec.is_bool().then_some(Found { spec, negated: true })
}

/// The names of a class, as messages list them.
fn names(class: Class) -> String {
    options::of(class).map(|spec| spec.name).collect::<Vec<_>>().join(" | ")
}

impl Parser<'_> {
    fn open_section(&mut self) -> Parsed<()> {
        self.settings = 0;
        self.punct(b'{')
    }

    /// The value of an option and the semicolon.
    fn option(&mut self, found: &Found) -> Parsed<SetOption> {
        let spec = found.spec;
        self.settings += 1;
        self.at_most(self.settings, SETTINGS_MAX, "settings in one section")?;
        let secret = spec.is_secret();
        let token = self.next()?;
        if token.is(b';') {
            if !spec.is_bool() {
                // The reference stores `yes` here and fails when it uses it.
                self.bad_value(spec, "")?;
            }
            return Ok(SetOption::new(spec, if found.negated { "no" } else { "yes" }));
        }
        if token.kind == Kind::End {
            return self.expected("a value", &token);
        }
        self.bad_value(spec, &token.text)?;
        self.after_secret = secret;
        self.punct(b';')?;
        Ok(SetOption::new(spec, token.text))
    }

    /// Notes a problem if the value is refused; parsing goes on.
    fn bad_value(&mut self, spec: &OptionSpec, value: &str) -> Parsed<()> {
        if let Err(reason) = spec.validate(value) {
            let at = self.here();
            self.out.problems.push(Problem::BadValue {
                at,
                option: spec.name.to_owned(),
                value: Shown::new(value, spec.is_secret()),
                reason,
            });
            self.at_most(self.out.problems.len(), 1000, "bad values")?;
        }
        Ok(())
    }

    /// `{ options }`. `_unknown NAME;`, which only appears in descriptions of running resources, is passed
    /// over.
    fn options_until_brace(
        &mut self,
        classes: &[Class],
        expected: &dyn Fn() -> String,
        mut store: impl FnMut(SetOption),
    ) -> Parsed<()> {
        self.open_section()?;
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                return Ok(());
            }
            if token.keyword() == "_unknown" {
                self.next()?;
                self.punct(b';')?;
                continue;
            }
            let Some(found) = lookup(classes, option_name(&token)) else {
                return self.expected(&expected(), &token);
            };
            store(self.option(&found)?);
        }
    }

    pub(super) fn net_section(&mut self, list: &mut OptionList) -> Parsed<()> {
        self.options_until_brace(&[Class::Net], &|| "an option keyword".to_owned(), |option| {
            list.push(option);
        })
    }

    pub(super) fn resource_options(&mut self, list: &mut OptionList) -> Parsed<()> {
        self.options_until_brace(&[Class::Resource], &|| names(Class::Resource), |option| list.push(option))
    }

    pub(super) fn handlers_section(&mut self, list: &mut OptionList) -> Parsed<()> {
        self.options_until_brace(&[Class::Handler], &|| names(Class::Handler), |option| list.push(option))
    }

    /// Options for a peer's volumes only.
    pub(super) fn peer_device_section(&mut self, list: &mut OptionList) -> Parsed<()> {
        self.options_until_brace(&[Class::PeerDevice], &|| names(Class::PeerDevice), |option| {
            list.push(option);
        })
    }

    pub(super) fn disk_section(
        &mut self,
        level: DiskLevel,
        disk: &mut DiskOptions,
        net: Option<&mut OptionList>,
    ) -> Parsed<()> {
        let mut classes = vec![Class::Attach, Class::Device, Class::PeerDevice];
        let mut moved = OptionList::default();
        if level == DiskLevel::Resource {
            classes.push(Class::Net);
        }
        let fencing_only = |name: &str| level == DiskLevel::Resource && name == "fencing";
        self.open_section()?;
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                break;
            }
            if token.keyword() == "_unknown" {
                self.next()?;
                self.punct(b';')?;
                continue;
            }
            let name = option_name(&token);
            let found = lookup(&classes, name)
                .filter(|found| found.spec.class != Class::Net || fencing_only(found.spec.name));
            let Some(found) = found else {
                return self.expected(&names(Class::PeerDevice), &token);
            };
            let option = self.option(&found)?;
            match disk.list_mut(found.spec.class) {
                Some(list) => list.push(option),
                None => moved.push(option),
            }
        }
        if let Some(net) = net {
            for option in &moved {
                net.push(option.clone());
            }
        }
        Ok(())
    }

    pub(super) fn startup_section(&mut self, body: &mut Body) -> Parsed<()> {
        self.open_section()?;
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                return Ok(());
            }
            match token.keyword() {
                "stacked-timeouts" => {
                    self.punct(b';')?;
                    body.stacked_timeouts = true;
                }
                // Swallowed: promotion is the cluster manager's business (spec/drbd-conf.md §8.1).
                "become-primary-on" => loop {
                    let token = self.next()?;
                    match token.kind {
                        Kind::Punct(b';') => break,
                        Kind::End | Kind::Punct(_) => return self.expected(";", &token),
                        _ => {}
                    }
                },
                _ => match lookup(&[Class::Startup], option_name(&token)) {
                    Some(found) => {
                        let option = self.option(&found)?;
                        body.startup.push(option);
                    }
                    None => {
                        return self
                            .expected("<an option keyword> | become-primary-on | stacked-timeouts", &token);
                    }
                },
            }
        }
    }

    /// 8.3's `syncer`: every option goes to the first list that knows it.
    pub(super) fn syncer_section(&mut self, body: &mut Body) -> Parsed<()> {
        const CLASSES: &[Class] = &[Class::Net, Class::Attach, Class::Resource, Class::PeerDevice];
        self.open_section()?;
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                return Ok(());
            }
            let name = match option_name(&token) {
                "rate" => "resync-rate",
                "after" => "resync-after",
                name => name,
            };
            let Some(found) = lookup(CLASSES, name) else {
                return self.expected("a syncer option keyword", &token);
            };
            let option = self.option(&found)?;
            match found.spec.class {
                Class::Net => body.net.push(option),
                Class::Resource => body.options.push(option),
                class => {
                    if let Some(list) = body.disk.list_mut(class) {
                        list.push(option);
                    }
                }
            }
        }
    }

    /// `{ NAME VALUE; ... plugin { words; ... } }`.
    pub(super) fn proxy_options(&mut self, proxy: &mut ProxyOptions) -> Parsed<()> {
        self.open_section()?;
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                return Ok(());
            }
            if token.keyword() == "plugin" {
                self.plugins(&mut proxy.plugins)?;
                continue;
            }
            let Some(found) = lookup(&[Class::Proxy], option_name(&token)) else {
                let at = self.here();
                return Err(Box::new(Problem::ProxyPlugin { at }));
            };
            let option = self.option(&found)?;
            proxy.options.push(option);
        }
    }

    fn plugins(&mut self, plugins: &mut Vec<String>) -> Parsed<()> {
        let token = self.next()?;
        if !token.is(b'{') {
            let at = self.here();
            return Err(Box::new(Problem::ProxyPlugin { at }));
        }
        let mut words: Vec<String> = Vec::new();
        loop {
            let token = self.next()?;
            match token.kind {
                Kind::Punct(b';') => {
                    if !words.is_empty() {
                        plugins.push(words.join(" "));
                        words.clear();
                    }
                }
                Kind::Punct(b'}') if words.is_empty() => return Ok(()),
                Kind::Punct(b'}') | Kind::End => {
                    let at = self.here();
                    return Err(Box::new(Problem::PluginSemicolon { at }));
                }
                _ => words.push(token.text),
            }
            self.at_most(words.len().max(plugins.len()), 256, "plugin words")?;
        }
    }
}

/// Option names need no quotes and are known by their text alone.
fn option_name(token: &Token) -> &str {
    match token.kind {
        Kind::Word | Kind::Quoted | Kind::Integer => &token.text,
        _ => "",
    }
}

"""How changes of shape get into the stream: as logical messages, each with the shape that a table has from there on.

Two may write them. Event triggers, where the source's owner has allowed it: in the transaction of the DDL, between the
changes before and after it. Else the source itself, that looks into the catalog now and then; its message comes later
than the DDL, but never before a change of the old shape.

Everybody may write logical messages, and what is in these becomes SQL on the mirror. So their prefix ends with a key
which only those can read who may read everything.
"""

from __future__ import annotations

from typing import Final

import psycopg
from psycopg import sql

from cdc.errors import FatalError
from cdc.postgres.connection import SESSION_SETTINGS, Connection, to_cdc_error, translated_errors
from cdc.postgres.schema import PUBLISHABLE
from cdc.postgres.shape import SHAPE

PREFIX: Final = "cdc.ddl:"
"""What is before the key."""

_KEY: Final = "SELECT key FROM cdc.ddl_capture"

_FIXED: Final = (
    "datestyle",
    "intervalstyle",
    "extra_float_digits",
    "timezone",
    "bytea_output",
    "lc_monetary",
    "row_security",
)


def trigger_key(connection: Connection) -> str | None:
    """The key that the source's event triggers use; `None` where there are none, or this role may not read it."""
    with translated_errors():
        rows = connection.execute(
            """SELECT has_schema_privilege('cdc', 'USAGE') AND has_table_privilege('cdc.ddl_capture', 'SELECT')
                WHERE to_regclass('cdc.ddl_capture') IS NOT NULL"""
        ).fetchall()
        if rows != [(True,)]:
            return None
        keys = connection.execute(_KEY).fetchall()
    return str(keys[0][0]) if keys else None


def is_installed(connection: Connection) -> bool:
    """Whether the event triggers are there, and enabled."""
    query = "SELECT count(*) FROM pg_event_trigger WHERE evtname = ANY (%s) AND evtenabled <> 'D'"
    with translated_errors():
        ((count,),) = connection.execute(query, [list(_TRIGGERS)]).fetchall()
    return bool(count == len(_TRIGGERS))


def installation(role: str) -> str:
    """The SQL that installs the event triggers, for a role that captures. May be run again."""
    triggers = "\n".join(
        f"DROP EVENT TRIGGER IF EXISTS {name};\n"
        f"CREATE EVENT TRIGGER {name} ON {event} EXECUTE FUNCTION cdc.capture_ddl();\n"
        f"ALTER EVENT TRIGGER {name} ENABLE ALWAYS;"
        for name, event in _TRIGGERS.items()
    )
    settings = "\n    ".join(f"SET {name} = '{SESSION_SETTINGS[name]}'" for name in _FIXED)
    return _INSTALL.format(grants=grants(role), settings=settings, function=_FUNCTION, triggers=triggers)


def grants(role: str) -> str:
    """What lets a role know the messages of the event triggers from others."""
    name = sql.Identifier(role).as_string(None)
    return f"GRANT USAGE ON SCHEMA cdc TO {name}; GRANT SELECT ON cdc.ddl_capture TO {name};"


def removal() -> str:
    """The SQL that removes what `installation` has made."""
    triggers = "\n".join(f"DROP EVENT TRIGGER IF EXISTS {name};" for name in _TRIGGERS)
    return f"{triggers}\nDROP FUNCTION IF EXISTS cdc.capture_ddl();\nDROP TABLE IF EXISTS cdc.ddl_capture;\n"


def execute(connection: Connection, script: str) -> None:
    """Run one of these scripts, as a whole or not at all. Raises `FatalError` where this role may not."""
    try:
        with connection.transaction():
            connection.execute(script.encode())
    except psycopg.errors.InsufficientPrivilege as exc:
        raise FatalError(
            f"this role may not capture DDL: {exc.diag.message_primary}",
            hint="event triggers need a superuser: let one run what `cdc init --ddl-capture --print` prints",
        ) from exc
    except psycopg.Error as exc:
        raise to_cdc_error(exc) from exc


_TRIGGERS: Final = {
    "cdc_table_rewrite": "table_rewrite",
    "cdc_sql_drop": "sql_drop",
    "cdc_ddl_command_end": "ddl_command_end",
}

_INSTALL: Final = """\
CREATE SCHEMA IF NOT EXISTS cdc;
CREATE TABLE IF NOT EXISTS cdc.ddl_capture (key text NOT NULL);
REVOKE ALL ON cdc.ddl_capture FROM PUBLIC;
INSERT INTO cdc.ddl_capture SELECT gen_random_uuid() WHERE NOT EXISTS (SELECT FROM cdc.ddl_capture);
{grants}
CREATE OR REPLACE FUNCTION cdc.capture_ddl() RETURNS event_trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    {settings}
AS $function${function}$function$;
REVOKE ALL ON FUNCTION cdc.capture_ddl() FROM PUBLIC;
{triggers}
"""

_FUNCTION: Final = f"""
DECLARE
    prefix text;
    rewritten jsonb;
    message json;
BEGIN
    prefix := '{PREFIX}' || (SELECT key FROM cdc.ddl_capture);
    rewritten := coalesce(nullif(current_setting('cdc.rewritten', true), ''), '{{}}')::jsonb;
    IF TG_EVENT = 'table_rewrite' THEN
        -- for the end of this command, which comes next
        PERFORM set_config('cdc.rewritten', (rewritten || jsonb_build_object(
            pg_event_trigger_table_rewrite_oid()::text,
            pg_event_trigger_table_rewrite_reason()))::text, true);
    ELSIF TG_EVENT = 'sql_drop' THEN
        FOR message IN
            SELECT json_build_object('oid', objid::bigint, 'schema', schema_name, 'name', object_name, 'dropped', true)
              FROM pg_event_trigger_dropped_objects()
             WHERE object_type = 'table' AND NOT is_temporary
        LOOP
            PERFORM pg_logical_emit_message(true, prefix, message::text);
        END LOOP;
    END IF;
    IF TG_EVENT <> 'table_rewrite' THEN
        FOR message IN
            WITH RECURSIVE touched (oid) AS (
                SELECT objid FROM pg_event_trigger_ddl_commands()
                 WHERE TG_EVENT = 'ddl_command_end' AND classid = 'pg_class'::regclass
                UNION
                SELECT c.oid FROM pg_event_trigger_ddl_commands() AS d
                  JOIN pg_class c ON c.relnamespace = d.objid
                 WHERE TG_EVENT = 'ddl_command_end' AND d.classid = 'pg_namespace'::regclass
                   AND d.command_tag = 'ALTER SCHEMA'
                UNION
                SELECT objid FROM pg_event_trigger_dropped_objects()
                 WHERE TG_EVENT = 'sql_drop' AND object_type = 'table column'
                UNION
                SELECT inhrelid FROM pg_inherits JOIN touched ON inhparent = touched.oid
            )
            SELECT jsonb_set({SHAPE}::jsonb, '{{rewrite}}', coalesce((
                       SELECT to_jsonb(bit_or(reason::int)) FROM jsonb_each_text(rewritten) AS r (relation, reason)
                        WHERE relation::oid = c.oid OR relation::oid IN (SELECT relid FROM pg_partition_tree(c.oid))
                   ), '0'))
              FROM pg_class c
              JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE {PUBLISHABLE} AND c.oid IN (SELECT touched.oid FROM touched)
        LOOP
            PERFORM pg_logical_emit_message(true, prefix, message::text);
        END LOOP;
        -- A message is sorted in by its end, a row by its beginning: without something between them the next row may
        -- come before a message of another subtransaction.
        PERFORM pg_logical_emit_message(false, 'cdc.heartbeat', '');
    END IF;
    IF TG_EVENT = 'ddl_command_end' AND rewritten <> '{{}}' THEN
        PERFORM set_config('cdc.rewritten', '', true);
    END IF;
EXCEPTION WHEN OTHERS THEN
    -- the DDL itself must not fail: cdc finds out later by itself
    RAISE WARNING 'cdc could not capture this DDL: %', SQLERRM;
END
"""  # noqa: S608 - constants

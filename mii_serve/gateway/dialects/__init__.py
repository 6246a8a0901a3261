"""The JSON protocols of foreign clients: each module decodes its bodies, encodes its answers and words its errors."""

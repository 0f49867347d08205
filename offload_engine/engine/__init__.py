"""The public class, and what stands around it: assembly and plan, many callers, asyncio, changes while it lives."""
